"""Memory of a Muon step on a CPU above weights, gradients and state, as formulas.

Sizes are in floats of 4 bytes for an oriented matrix [m, n], m <= n. The step has four phases, and
the largest counts: the root iteration of spectral formats, the Gram matrix of what is
orthogonalised, its Newton-Schulz operator, and the weight update. To each is added what the C++
products pack (csrc/cpu/product.cpp), which torch does not see. The m x m iterations are not
formulas: they run on tensors without data (`LiveBytes`).

tests/tools/test_plan_memory.py holds this to what torch's profiler and the C++ products measure.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowbit_muon.backends import get_backend
from lowbit_muon.backends.cpu.adapter import SIDE_BY_SIDE
from lowbit_muon.formats.state_format import StateFormat
from lowbit_muon.linalg.coefficients import resolve_coefficients
from lowbit_muon.linalg.newton_schulz import ROUNDED_ROWS, gram_operator
from lowbit_muon.linalg.root_fractions import root_fractions
from lowbit_muon.linalg.root_iteration import iterate_root
from lowbit_muon.state.operands import SCRATCH_FLOATS
from lowbit_muon.step.batches import HOST_ELEMENTS
from lowbit_muon.tools.plan.device_workspace import META, LiveBytes, SizingBackend

FLOAT_BYTES = 4
# Of csrc/cpu: rows of a strip, steps and rows of a streamed block, words packed at once
# (kStrip, kFloatSteps, kStreamBlock, kPackedWords).
_STRIP, _STREAM, _PACKED_WORDS = 16, 192, 2**20
# Rows of the largest matrices that are inverted without spare memory (kSmallInverse).
_SMALL_INVERSE = 64
# lowbit_muon/state/operands.py: rows that panels of a Gram matrix have at least.
_FEWEST_ROWS = 64
# Coefficients and steps of torch.optim.Muon, our default.
_COEFFICIENTS = resolve_coefficients("muon", 5)


def muon_step_bytes(
    shape: Sequence[int],
    count: int,
    state_format: StateFormat,
    dtype: torch.dtype,
    *,
    stack: bool = False,
) -> int:
    """Most bytes that a step of `count` parameters of a shape holds above weights, gradients and
    state.

    Small matrices are stepped in batches (`step.batches`), large ones one after another. stack: all
    but the last two dimensions count matrices (`batch_experts`).
    """
    rows, columns = (shape[-2], shape[-1]) if stack else (shape[0], math.prod(shape[1:]))
    m, n = sorted((rows, columns))
    if not m:
        return 0
    count *= math.prod(shape[:-2]) if stack else 1
    encoder = 3 * m * m if state_format.spectral else 0
    batch = min(count, max(1, HOST_ELEMENTS // (m * n + encoder)))
    floats, packed = _matrix_floats(m, n, state_format, dtype)
    found = FLOAT_BYTES * (batch * floats + min(batch, torch.get_num_threads()) * packed)
    # several gradients lie side by side, and their codes in a new place
    return found + (batch * m * n * (dtype.itemsize + 1) if batch > 1 else 0)


def _matrix_floats(m: int, n: int, f: StateFormat, dtype: torch.dtype) -> tuple[int, int]:
    """Floats for one matrix, and those that its products pack."""
    in_memory = f.spectral or m * n <= SCRATCH_FLOATS
    # rows of a panel, `row_slices`
    panel = n * (m if m * n <= SCRATCH_FLOATS else max(1, SCRATCH_FLOATS // n))
    rank = f.rank(m, n)
    # the decoder keeps factors; storing new ones takes the old, their directions, P, R and copies
    kept = rank * (m + n)
    buffer = m * n if in_memory else 0
    phases = [buffer + kept + _operator_floats(m)]
    rounded = get_backend("auto", torch.device("cpu")).rounded_dtype is not None
    if m >= ROUNDED_ROWS and n < 2 * m and rounded:
        # the standard form: X, the next X, X X^T and its polynomial
        phases.append(kept + 2 * m * n + 2 * m * m)
    if in_memory:
        packed = max(_packed_symmetric(m, m, 2), _packed_symmetric(m, n, 1))
    else:
        room = max(SCRATCH_FLOATS, 3 * m * m)
        height = m if m * n <= room else min(m, max(_FEWEST_ROWS, room // (2 * n)))
        phases.append(kept + m * m + (1 if height == m else 2) * height * n)
        packed = max(
            _packed_symmetric(m, m, 2),
            _packed_symmetric(height, n, 1),
            0 if height == m else _packed(height, height, n),
        )
    packed = max(packed, _packed(m, n, m))
    if f.spectral:
        phases.append(buffer + _root_floats(m, f.shift(m)))
    # the operator, a panel of X if that is not in memory, and for a weight in half precision a
    # panel of the update and the two that torch converts to float32 to add it
    update = 0
    if dtype != torch.float32:
        update = 3 * min(m, max(1, SCRATCH_FLOATS // (2 * n))) * n
    phases.append(buffer + kept + m * m + (0 if in_memory else panel) + update)
    # Storing: the operator of a spectral format, a panel; a companded copy of it and, if there are
    # several, of the last one; factors, old and new.
    companded = min(2 * panel, m * n) if f.companded_scale else 0
    operator = m * m if f.spectral else 0
    phases.append(buffer + operator + panel + companded + kept + 3 * kept)
    if f.normalize:  # a Frobenius norm in float64 converts the whole gradient
        phases.append(2 * m * n)
    return max(phases), packed


def _packed(rows: int, columns: int, depth: int) -> int:
    """Floats that a product [rows, depth] x [depth, columns] packs: the smaller factor, and a block
    of the other for each thread."""
    small = -(-min(rows, columns) // _STRIP) * _STRIP
    large = -(-max(rows, columns) // _STRIP) * _STRIP
    return small * depth + torch.get_num_threads() * _STREAM * min(_STREAM, large)


def _packed_symmetric(size: int, depth: int, operands: int) -> int:
    """Floats that a symmetric product packs of one or two different factors [size, depth]."""
    rows = -(-size // _STRIP) * _STRIP
    most = max(_STREAM, _PACKED_WORDS // (operands * rows))
    steps = -(-depth // max(1, -(-depth // most)))
    return operands * rows * steps


@functools.cache
def _operator_floats(m: int) -> int:
    """Of the Newton-Schulz operator of a Gram matrix [m, m], that matrix included."""
    return _traced_floats(m, lambda gram: gram_operator(gram, _COEFFICIENTS, SizingBackend()))


def _root_floats(m: int, shift: float) -> int:
    """Of the spectral encoder's operator, the Gram matrix included."""
    fractions = root_fractions(shift)
    if fractions is None:
        return _iterated_root_floats(m, shift)
    threads = torch.get_num_threads()
    together = 1 if m > SIDE_BY_SIDE and threads > 2 else min(len(fractions.poles), threads)
    return 2 * m * m + together * (m * (-(-m // _STRIP) + 1) * _STRIP + _inverse_spare(m))


def _inverse_spare(m: int) -> int:
    """Floats that an inverse takes beside its matrix (csrc/cpu/inverse.cpp)."""
    if m <= _SMALL_INVERSE:
        return 0
    first = -(-(m // 2) // _STRIP) * _STRIP
    return first * (m - first) + max(_inverse_spare(first), _inverse_spare(m - first))


@functools.cache
def _iterated_root_floats(m: int, shift: float) -> int:
    return _traced_floats(
        m, lambda gram: iterate_root(gram, shift, SizingBackend(), overwrite=True)
    )


def _traced_floats(m: int, run: Callable[[Tensor], Tensor]) -> int:
    with torch.no_grad(), LiveBytes() as memory:
        # a batch of one: its products write into their results, as the CPU kernels do
        run(torch.empty(1, m, m, device=META))
    return memory.peak // FLOAT_BYTES
