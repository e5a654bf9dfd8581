"""The training text: chapter-like pieces, some of them held out, the others in sequences."""

from __future__ import annotations

import functools
import gzip
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from lowbit_muon.tools.errors import UserError

# A piece ends at the first blank line after this many characters (half a chapter of the Bible), so
# that a text of short paragraphs is not held out paragraph by paragraph ...
PIECE_CHARACTERS = 2000
# ... or, in a text without blank lines, at the first line end after this many.
LONGEST_PIECE_CHARACTERS = 16000


def read_text(path: str) -> str:
    """The user's own text file, or the embedded King James Bible excerpt if `path` is empty."""
    if not path:
        packed = resources.files("lowbit_muon.tools.finetune") / "data" / "kjv_excerpt.txt.gz"
        return gzip.decompress(packed.read_bytes()).decode("ascii")
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text: cannot read {path} as UTF-8 text: {error}") from None


def split_pieces(text: str) -> list[str]:
    """Cut a text into contiguous pieces at blank lines; joined, they are the text again.

    The embedded text has a blank line after each chapter, so its pieces are whole chapters.
    """
    pieces: list[str] = []
    lines: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        at_blank = not line.strip()
        if size >= (PIECE_CHARACTERS if at_blank else LONGEST_PIECE_CHARACTERS):
            pieces.append("".join(lines))
            lines, size = [], 0
    return [*pieces, "".join(lines)] if lines else pieces


@dataclass(frozen=True)
class Corpus:
    """Token ids of the training pieces and of the held-out pieces, each joined; int64 [tokens]."""

    train: Tensor
    held_out: Tensor
    sequence_length: int

    def batch(self, step: int, sequences: int, seed: int) -> Tensor:
        """Sequences of one step, int64 [sequences, sequence_length + 1].

        A pure function of its arguments: a resumed run sees the data of an uninterrupted one. Each
        pass over the text has its own order.
        """
        windows = (self.train.numel() - 1) // self.sequence_length
        rows = []
        for index in range(step * sequences, (step + 1) * sequences):
            epoch, position = divmod(index, windows)
            order = _order(windows, seed, epoch)
            rows.append(_window(self.train, int(order[position]), self.sequence_length))
        return torch.stack(rows)

    def held_out_windows(self) -> list[Tensor]:
        """All held-out text as sequences, int64 [1, sequence_length + 1] each."""
        windows = (self.held_out.numel() - 1) // self.sequence_length
        return [_window(self.held_out, i, self.sequence_length)[None] for i in range(windows)]


def make_corpus(
    text: str, encode: Callable[[str], list[int]], held_out_tokens: int, sequence_length: int
) -> Corpus:
    """Tokenise a text and hold out whole pieces, evenly spread, of at least `held_out_tokens`.

    Raises UserError if that leaves less than half of the text to train on.
    """
    pieces = [torch.tensor(encode(piece), dtype=torch.int64) for piece in split_pieces(text)]
    total = sum(piece.numel() for piece in pieces)
    wanted = held_out_tokens + sequence_length  # the last window is cut off
    for count in range(1, len(pieces) // 2 + 1):
        chosen = {int((i + 0.5) * len(pieces) / count) for i in range(count)}
        held_out = [piece for i, piece in enumerate(pieces) if i in chosen]
        if sum(piece.numel() for piece in held_out) >= wanted:
            break
    else:
        raise UserError(
            f"--held-out-tokens: {held_out_tokens} of a text of {total} tokens in {len(pieces)} "
            "pieces would leave less than half to train on; give a longer text or hold out less"
        )
    train = torch.cat([piece for i, piece in enumerate(pieces) if i not in chosen])
    if train.numel() <= sequence_length:
        raise UserError(
            f"--sequence-length: expected fewer than the {train.numel()} training tokens, "
            f"got {sequence_length}"
        )
    return Corpus(train, torch.cat(held_out), sequence_length)


@functools.lru_cache(maxsize=2)  # two passes meet in one batch at most
def _order(windows: int, seed: int, epoch: int) -> Tensor:
    """Of the windows in one pass over the text; int64 [windows]."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(windows, generator=generator)


def _window(ids: Tensor, index: int, length: int) -> Tensor:
    return ids[index * length : (index + 1) * length + 1]
