"""How stored matrices of each family of formats are written and read, one family a file."""

from __future__ import annotations

import functools

from lowbit_muon.formats.state_format import StateFormat
from lowbit_muon.state.codec import Codec
from lowbit_muon.state.codecs.coded import Coded
from lowbit_muon.state.codecs.dense import DenseCodec
from lowbit_muon.state.codecs.low_rank import LowRank
from lowbit_muon.state.codecs.spectral import Spectral


@functools.lru_cache(maxsize=1024)
def codec_of(state_format: StateFormat, shape: tuple[int, int]) -> Codec:
    """The codec of matrices [rows, columns] in a format."""
    if state_format.is_dense:
        return DenseCodec(state_format, shape)
    if state_format.spectral:
        return Spectral(state_format, shape)
    return (LowRank if state_format.rank(*shape) else Coded)(state_format, shape)
