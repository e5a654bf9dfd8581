"""Formats: validation, serialisation, codebooks, presets."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from lowbit_muon.formats.codebook import (
    CODE_BITS,
    Codebook,
    CodeLayout,
    mu_law_expand,
)
from lowbit_muon.formats.presets import PRESETS, resolve_format
from lowbit_muon.formats.state_format import StateFormat


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip_through_plain_values(name: str) -> None:
    plain = json.loads(json.dumps(PRESETS[name].to_dict()))
    assert StateFormat.from_dict(plain) == PRESETS[name]
    assert hash(StateFormat.from_dict(plain)) == hash(PRESETS[name])
    assert resolve_format(name) is PRESETS[name]


def test_formats_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["spectral4"].bits = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "shift"),
    [("spectral8", 0.1), ("spectral4", 0.1), ("spectral3", 0.03), ("spectral2", 0.03)],
)
def test_wide_matrices_of_four_bits_have_a_larger_shift(name: str, shift: float) -> None:
    found = PRESETS[name]
    assert (found.shift(511), found.shift(512)) == (0.03, shift)
    assert dataclasses.replace(found, spectral_shift=0.2).shift(512) == 0.2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bits", 5),
        ("bits", True),
        ("bits", 4.0),
        ("name", ""),
        ("codebook", "gaussian"),
        ("mu", 0),
        ("mu", math.nan),
        ("mu", "255"),
        ("exponent", -1.0),
        ("tread", "mid"),
        ("table", (1.0, 2.0)),
        ("granularity", "column"),
        ("block_size", 64),
        ("block_size", -1),
        ("statistic", "max"),
        ("clip", math.inf),
        ("factor_rank", -2),
        ("factor_divisor", 1.5),
        ("factor_bits", 5),
        ("spectral_shift", 0.0),
        ("spectral_shift", 0.0049),
    ],
)
def test_bad_fields_are_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(StateFormat("base", 4), **{field: value})


def test_bad_combinations() -> None:
    with pytest.raises(ValueError, match="factor_rank"):
        StateFormat("x", 4, factor_rank=2, factor_divisor=16)
    with pytest.raises(ValueError, match="spectral"):
        StateFormat("x", 4, spectral=True, factor_divisor=16)
    with pytest.raises(ValueError, match="block_size"):
        StateFormat("x", 4, granularity="block")
    with pytest.raises(ValueError, match="snap_levels"):
        StateFormat("x", 8, mu=255.0)  # 8-bit mu-law levels near zero collide as int8
    with pytest.raises(ValueError, match="table"):
        StateFormat("x", 2, codebook="table", table=(1.0, 2.0, 3.0, 4.0, 5.0))
    with pytest.raises(ValueError, match="ascending"):
        StateFormat("x", 2, codebook="table", table=(1.0, 0.0), snap_levels=False)
    with pytest.raises(ValueError, match="mu_law"):
        StateFormat("x", 4, codebook="linear", companded_scale=True)
    with pytest.raises(ValueError, match="companded_scale: expected False together with spectral"):
        StateFormat("x", 4, spectral=True, companded_scale=True)


def test_from_dict_names_what_is_wrong() -> None:
    plain = PRESETS["spectral4"].to_dict()
    with pytest.raises(ValueError, match="colour"):
        StateFormat.from_dict({**plain, "colour": 1})
    del plain["bits"]
    with pytest.raises(ValueError, match="bits"):
        StateFormat.from_dict(plain)
    with pytest.raises(ValueError, match="mapping"):
        StateFormat.from_dict("spectral4")  # type: ignore[arg-type]


def test_resolve_format_errors() -> None:
    with pytest.raises(ValueError, match=r"spectral4.*got 'spectral5'"):
        resolve_format("spectral5")
    with pytest.raises(TypeError, match="got int"):
        resolve_format(4)  # type: ignore[arg-type]


@pytest.mark.parametrize("mu", [0.36, 2.0, 255.0])
def test_mu_law_is_inverted(mu: float) -> None:
    for k in range(-50, 51):
        x = k / 50
        compressed = math.copysign(math.log1p(mu * abs(x)) / math.log1p(mu), x)
        assert mu_law_expand(compressed, mu) == pytest.approx(x, abs=1e-14)


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("tread", ["mid_rise", "mid_tread"])
@pytest.mark.parametrize("codebook", ["mu_law", "linear", "power_law"])
def test_codebooks_are_symmetric_and_ascending(bits: int, tread: str, codebook: str) -> None:
    f = StateFormat(
        "x",
        bits,
        codebook=codebook,
        exponent=1.5,
        tread=tread,
        snap_levels=False,  # type: ignore[arg-type]
    )
    book = f.code_book()
    assert len(book.levels) == (2**bits if tread == "mid_rise" else 2**bits - 1)
    assert (0.0 in book.levels) == (tread == "mid_tread")
    assert max(book.levels) == pytest.approx(1.0)
    for low, high in zip(book.levels, reversed(book.levels), strict=True):
        assert low == pytest.approx(-high)
    for threshold, low, high in zip(book.thresholds, book.levels, book.levels[1:], strict=False):
        assert low < threshold < high


@pytest.mark.parametrize(
    ("name", "levels"), [("spectral4", 16), ("spectral3", 8), ("spectral2", 4), ("linear8", 255)]
)
def test_snapped_levels_are_int8(name: str, levels: int) -> None:
    book = PRESETS[name].code_book()
    assert len(book.levels) == levels
    assert all(level == int(level) and abs(level) <= 127 for level in book.levels)
    assert max(book.levels) == 127


def test_codebook_errors() -> None:
    with pytest.raises(ValueError, match="ascending"):
        Codebook((1.0, 1.0), (1.0,))
    with pytest.raises(ValueError, match="thresholds"):
        Codebook((0.0, 1.0), ())
    with pytest.raises(ValueError, match="levels"):
        Codebook((), ())


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("columns", [0, 1, 2, 63, 64, 65, 127, 128, 129, 256, 513, 1536])
def test_packing_wastes_less_than_a_byte_a_plane(bits: int, columns: int) -> None:
    layout = CodeLayout(bits, 0, "rms", 1.0)
    exact = columns * bits / 8
    assert exact <= layout.row_bytes(columns) < exact + len(layout.planes)


def test_ranks() -> None:
    mulaw4 = PRESETS["mulaw4"]
    assert mulaw4.rank(576, 1536) == 36
    assert mulaw4.rank(1536, 576) == 36
    assert mulaw4.rank(8, 64) == 1  # never rank 0 with a format that has factors
    assert mulaw4.rank(0, 5) == 0
    assert StateFormat("x", 4, factor_rank=10).rank(4, 100) == 4
    assert PRESETS["spectral4"].rank(64, 64) == 0
