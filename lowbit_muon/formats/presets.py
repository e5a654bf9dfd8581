"""The named state formats, each with its source."""

from __future__ import annotations

from typing import Any

from lowbit_muon.formats.state_format import StateFormat


def _gaussian(name: str, bits: int, mu: float, clip: float, **options: Any) -> StateFormat:
    """Mid-rise mu-law for entries that are close to normal, one RMS scale a row, rotated.

    mu and clip minimise the mean squared error of a unit Gaussian for 2**bits levels (Nelder-Mead
    on the exact error): 0.0098, 0.035 and 0.117 for 4, 3 and 2 bits after snapping to int8, which
    is Lloyd-Max's error to 3%. The rotation is what makes the entries normal.
    """
    return StateFormat(name, bits, mu=mu, clip=clip, rotate=True, **options)


# QLoRA, arXiv 2305.14314, appendix E: quantiles of a Gaussian with an exact zero.
_NF4 = (
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
)  # fmt: skip

PRESETS: dict[str, StateFormat] = {
    f.name: f
    for f in (
        _gaussian("spectral4", 4, mu=2.0, clip=2.7, spectral=True),
        _gaussian("spectral3", 3, mu=1.0, clip=2.14, spectral=True),
        _gaussian("spectral2", 2, mu=0.36, clip=1.51, spectral=True),
        # Equal steps, since mu-law's would not stay distinct as int8; clip is the best of 3.5 to 6
        # by the update's error on momentum of SmolLM2-135M, stored once: 0.013, with mu-law 0.010.
        StateFormat(
            "spectral8",
            bits=8,
            codebook="linear",
            tread="mid_tread",
            clip=4.0,
            rotate=True,
            spectral=True,
        ),
        _gaussian("mulaw4", 4, mu=2.0, clip=2.7, factor_divisor=16),
        # MuonQ as published (arXiv 2605.11396): mu = 255, 15 mid-tread levels, absmax scales in the
        # companded domain, one for the residual and one for each factor column, rank min(m, n)/16.
        StateFormat(
            "muonq4",
            bits=4,
            mu=255.0,
            tread="mid_tread",
            granularity="tensor",
            statistic="absmax",
            clip=1.0,
            companded_scale=True,
            snap_levels=False,
            factor_divisor=16,
            residual_after="exact",
            normalize=True,
        ),
        # 8-bit Muon (arXiv 2509.23106): linear, blocks of 2048, absmax.
        StateFormat(
            "linear8",
            bits=8,
            codebook="linear",
            tread="mid_tread",
            granularity="block",
            block_size=2048,
            statistic="absmax",
            clip=1.0,
        ),
        # Snapping would merge the fine levels near zero, which is where 8-bit mu-law gains.
        StateFormat("mulaw8", bits=8, mu=4.5, clip=4.2, snap_levels=False),
        StateFormat(
            "nf4",
            bits=4,
            codebook="table",
            table=_NF4,
            granularity="block",
            block_size=64,
            statistic="absmax",
            clip=1.0,
            snap_levels=False,
        ),
        StateFormat("bf16", bits=16),
        StateFormat("fp32", bits=32),
    )
}


def resolve_format(state_format: str | StateFormat) -> StateFormat:
    """The `StateFormat` meant by a preset name or given as it is.

    Raises ValueError for an unknown name and TypeError for anything that is neither.
    """
    if isinstance(state_format, StateFormat):
        return state_format
    if not isinstance(state_format, str):
        raise TypeError(
            "state_format: expected a preset name or a StateFormat, "
            f"got {type(state_format).__name__}"
        )
    if state_format not in PRESETS:
        raise ValueError(f"state_format: expected one of {sorted(PRESETS)}, got {state_format!r}")
    return PRESETS[state_format]
