"""The bytes that are trained on: the King James Bible and Python's standard library."""

from __future__ import annotations

import functools
import hashlib
import sysconfig
from pathlib import Path

import torch

from lowbit_muon.tools.finetune.text import Corpus, make_corpus, read_text


def library_source() -> str:
    """The modules at the top of the standard library, one after the other."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return "\n\n".join(
        path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.py"))
    )


@functools.cache
def corpus(held_out_bytes: int, context: int) -> tuple[Corpus, str]:
    """(both texts as one corpus of bytes, a digest of it); half of what is held out is of each.

    The source is that of the running Python: the digest says whether two runs had the same text.
    """
    parts = [
        make_corpus(text, lambda piece: list(piece.encode()), held_out_bytes // 2, context)
        for text in (read_text(""), library_source())
    ]
    joined = Corpus(
        torch.cat([part.train for part in parts]),
        torch.cat([part.held_out[: held_out_bytes // 2] for part in parts]),
        context,
    )
    digest = hashlib.sha256(joined.train.to(torch.uint8).numpy().tobytes()).hexdigest()
    return joined, digest[:16]
