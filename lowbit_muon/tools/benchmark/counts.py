"""Bytes and operations of a call, of the matrix products that it really does; m <= n, T = 5 steps.

Bytes are those that must be read and written, once each; P are those of the stored matrix and e of
an element of weights and gradients. A multiply-add is two operations, a product of which one
triangle is computed has half of them, and work on single elements has none::

    part                bytes                    operations
    copy                8 m n                    0
    quantize            4 m n + P                spectral: G + root + 2 m^2 n
    dequantize          4 m n + P                spectral: G + 2 m^2 n
    lut_gram            P + 4 m^2                G; spectral: G + 3 S, of the decoded matrix
    orthogonalize       8 m n                    G + (4 T - 3) S + 2 m^2 n, the Gram form;
                                                 T (G + S + 2 m^2 n), the standard form
    step                2 P + 3 e m n            dequantize + quantize + orthogonalize
    torch.mm Gram       e (m n + m^2)            2 m^2 n
    Newton-Schulz       2 e m n                  T (4 m^2 n + 2 m^3)
    torch.optim.Muon    5 e m n                  those of Newton-Schulz
    AdamW               3 e m n + 2 of state     0

G = m (m + 1) n and S = m^2 (m + 1) are symmetric products. The root of a spectral format is a
number of inverses on hosts, m^3 each (LAPACK's potrf and potri, http://www.netlib.org/lapack), and
of symmetric products on devices. Formats with low-rank factors, whose power iteration is a QR
decomposition each time, and a device's step, which may restart, have no count of operations, and
no GFLOP/s.
tests/tools/test_benchmark_counts.py holds all of it to what the code does.
"""

from __future__ import annotations

import torch

from lowbit_muon.backends.base import Backend
from lowbit_muon.formats.state_format import StateFormat
from lowbit_muon.linalg.coefficients import resolve_coefficients
from lowbit_muon.linalg.newton_schulz import ROUNDED_ROWS, takes_gram_form
from lowbit_muon.linalg.root_fractions import root_fractions
from lowbit_muon.linalg.root_iteration import root_coefficients

# What limits a call: names of the cases that find the most of it (`peaks`).
FROM_MEMORY, IN_L2 = "copy from memory", "copy in L2"
FP32_PRODUCT, BF16_PRODUCT = "torch.mm fp32", "torch.mm bf16"
L2_BYTES = 256 * 2**10  # of source and of target for each thread: half of an L2 cache of 1 MiB
NS_STEPS = 5


def nearest_copy(moved: float, device: torch.device) -> str:
    """The copy that limits so many bytes, which a thread's L2 cache may hold between calls."""
    in_l2 = device.type == "cpu" and moved <= 2 * L2_BYTES * torch.get_num_threads()
    return IN_L2 if in_l2 else FROM_MEMORY


def is_copy(roof: str) -> bool:
    """Whether a limit is one of bytes."""
    return roof.startswith("copy")


def product_operations(m: int, k: int, n: int) -> float:
    """Operations of [m, k] @ [k, n]; a multiply-add is two."""
    return 2.0 * m * k * n


def symmetric_operations(m: int, k: int) -> float:
    """Operations of a symmetric [m, k] @ [k, m] of which one triangle is computed.

    m(m+1)/2 entries of k multiply-adds. Tiles that the diagonal cuts do up to a tile's width more.
    """
    return float(m * (m + 1) * k)


def plain_newton_schulz_operations(m: int, n: int) -> float:
    """Of the three products of each step, none of them by triangles."""
    return NS_STEPS * (2 * product_operations(m, n, m) + product_operations(m, m, m))


def newton_schulz_operations(m: int, n: int, *, gram_form: bool) -> float:
    """Of both forms of `linalg.newton_schulz`."""
    gram, square = symmetric_operations(m, n), symmetric_operations(m, m)
    if not gram_form:
        return NS_STEPS * (gram + square + product_operations(m, m, n))
    # T products of H, T-1 of Q, 2T-2 of R; then Q X
    return gram + (4 * NS_STEPS - 3) * square + product_operations(m, m, n)


def orthogonalize_operations(m: int, n: int, backend: Backend, *, rounded: bool = False) -> float:
    """Of the form that is taken; rounded: with bfloat16 where that is precise."""
    coefficients = resolve_coefficients("muon", NS_STEPS)
    gram_form = takes_gram_form((m, n), coefficients, torch.float32, backend, rounded=rounded)
    return newton_schulz_operations(m, n, gram_form=gram_form)


def decode_operations(f: StateFormat, m: int, n: int) -> float | None:
    """Of a stored matrix; None where they are not counted."""
    if f.spectral:
        return symmetric_operations(m, n) + product_operations(m, m, n)
    return None if f.rank(m, n) else 0.0


def encode_operations(f: StateFormat, m: int, n: int, backend: Backend) -> float | None:
    """Of a matrix that is to be stored; None where they are not counted."""
    if not f.spectral:
        return None if f.rank(m, n) else 0.0
    root = _root_operations(f.shift(m), m, backend)
    return symmetric_operations(m, n) + root + product_operations(m, m, n)


def lut_gram_operations(f: StateFormat, m: int, n: int) -> float | None:
    """Of the Gram matrix of a stored matrix, from its codes; None where they are not counted."""
    gram = symmetric_operations(m, n)
    if f.rank(m, n):
        return None
    return gram + 3 * symmetric_operations(m, m) if f.spectral else gram


def _root_operations(shift: float, m: int, backend: Backend) -> float:
    fractions = None if backend.asynchronous else root_fractions(shift)
    if fractions is None:
        return root_coefficients(shift).matrix_products * symmetric_operations(m, m)
    return float(len(fractions.poles) * m**3)


def step_rounds(m: int, backend: Backend) -> bool:
    """Whether a step's products may take half precision."""
    return backend.rounded_dtype is not None and m >= ROUNDED_ROWS


def step_operations(f: StateFormat, m: int, n: int, backend: Backend) -> float | None:
    """Of a step of Muon with Nesterov's look-ahead; None where they are not counted."""
    decode, encode = decode_operations(f, m, n), encode_operations(f, m, n, backend)
    if decode is None or encode is None or f.normalize or backend.asynchronous:
        return None
    rounded = step_rounds(m, backend)
    return decode + encode + orthogonalize_operations(m, n, backend, rounded=rounded)
