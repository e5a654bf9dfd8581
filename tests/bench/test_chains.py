"""The loop behind the peaks: it multiplies as often as it says, and asks for a compiler."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import chains
from lowbit_muon.backends.cpu import adapter as cpu

if cpu.unavailable_reason() is not None:
    pytest.skip(str(cpu.unavailable_reason()), allow_module_level=True)

ISAS = cpu.supported_isas()
PER_LANE = {"float32": 1, "int16": 2, "int8": 4, "bfloat16": 2}
LEVELS_OF = {"int8": ("avx512vnni", "avx512bf16", "amx"), "bfloat16": ("avx512bf16", "amx")}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("isa", ISAS)
def test_chains_multiply_as_often_as_they_say(isa: str, threads: int) -> None:
    torch.set_num_threads(threads)
    for word in chains.WORDS:
        if isa not in LEVELS_OF.get(word, ISAS):
            with pytest.raises(ValueError, match=f"word: expected .*, as level '{isa}' has no"):
                chains.multiply_adds(isa, word, 1)
            continue
        once = chains.multiply_adds(isa, word, 1)
        # sixteen lanes in each chain, and enough chains to hide a latency of four cycles
        assert once % (16 * PER_LANE[word] * threads) == 0
        assert once >= 2 * 16 * PER_LANE[word] * threads
        for iterations in (2, 1000, 12345):
            assert chains.multiply_adds(isa, word, iterations) == iterations * once


def test_wrong_arguments_raise() -> None:
    with pytest.raises(ValueError, match=r"word: expected one of .*'float32'.* got 'int4'"):
        chains.multiply_adds(ISAS[0], "int4", 1)
    with pytest.raises(ValueError, match=r"isa: expected one of .*'baseline'.* got 'mmx'"):
        chains.multiply_adds("mmx", "float32", 1)
    for iterations in (0, 2**24 + 1):
        with pytest.raises(ValueError, match=rf"iterations: expected 1 to .*{iterations}"):
            chains.multiply_adds(ISAS[0], "float32", iterations)


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("/nonexistent/c++", r"need a C\+\+17 compiler"), ("false", r"false does not compile")],
)
def test_without_a_compiler_it_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: str, reason: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(chains, "LIBRARIES", tmp_path)
    chains._library.cache_clear()
    with pytest.raises(RuntimeError, match=reason):
        chains.multiply_adds(ISAS[0], "float32", 1)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
