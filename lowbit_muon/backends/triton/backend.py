"""`Backend` in Triton."""

from __future__ import annotations

from lowbit_muon.backends.memory import Checks
from lowbit_muon.backends.triton import DEVICE_TYPES, unavailable_reason
from lowbit_muon.backends.triton.dense_products import DenseProducts
from lowbit_muon.backends.triton.elementwise import Elementwise
from lowbit_muon.backends.triton.integer_products import IntegerProducts


class TritonBackend(Elementwise, IntegerProducts, DenseProducts):
    """The kernels for any GPU that Triton compiles for.

    Construction raises RuntimeError if there is no triton or no GPU. No method makes the host wait,
    and after a first call of its kind each can be captured in a graph.
    """

    name = "triton"
    asynchronous = True
    checks = Checks(*DEVICE_TYPES)

    def __init__(self) -> None:
        reason = unavailable_reason()
        if reason is not None:
            raise RuntimeError(f"backend: 'triton' is not available: {reason}")
