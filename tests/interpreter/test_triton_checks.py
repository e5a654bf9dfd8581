"""What the element-wise kernels refuse, and what the backend says of itself."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from comparison import TRITON, codebooks, layout, random_codes
from torch import Tensor

from lowbit_muon.backends.codes import Terms
from lowbit_muon.backends.triton import unavailable_reason


def test_available_in_the_interpreter() -> None:
    assert unavailable_reason() is None
    assert TRITON.name == "triton"
    assert TRITON.asynchronous


def test_wrong_tensors_raise() -> None:
    x, good, book = torch.randn(4, 200), random_codes(4, 200, 4), codebooks(4)[0]

    def quantize(x: Tensor, **out: Tensor) -> object:
        return TRITON.quantize(x, book, layout(4), **out)

    def decode(**fields: object) -> object:
        codes = dataclasses.replace(good, **fields)  # type: ignore[arg-type]
        return TRITON.accumulate(torch.empty(4, 200), Terms(codes=codes))

    def update(grad: Tensor | None, weight: float = 0.0, **outputs: Tensor) -> object:
        places = {"packed": good.packed.clone(), "scales": good.scales.clone(), **outputs}
        return TRITON.update_codes(Terms(weight, good, grad=grad), **places)

    cases = [
        (TypeError, "x", lambda: quantize(x.double())),
        (ValueError, "x", lambda: quantize(x[0])),
        (ValueError, "x", lambda: quantize(x.to("meta"))),
        (ValueError, "x", lambda: quantize(x.to_sparse())),
        (TypeError, "packed", lambda: quantize(x, packed=torch.empty(4, 104, dtype=torch.int8))),
        (ValueError, "packed", lambda: quantize(x, packed=good.packed[:, 1:])),
        (ValueError, "packed", lambda: quantize(x, packed=good.packed.T.contiguous().T)),
        (ValueError, "scales", lambda: quantize(x, scales=torch.empty(4, 2))),
        (ValueError, "scales", lambda: TRITON.encode(x, torch.ones(3, 1), book, layout(4))),
        (ValueError, "codes.packed", lambda: decode(packed=good.packed[:3])),
        (ValueError, "codes.scales", lambda: decode(scales=good.scales.expand(4, 2))),
        (TypeError, "codes.scales", lambda: decode(scales=good.scales.half())),
        (ValueError, "codes", lambda: decode(columns=199)),
        (ValueError, "buffer", lambda: TRITON.accumulate(x[:1].expand(4, 200), Terms())),
        (ValueError, "buffer", lambda: TRITON.accumulate(x.T, Terms())),
        (TypeError, "buffer", lambda: TRITON.accumulate(x.half(), Terms())),
        (ValueError, "grad", lambda: TRITON.accumulate(x, Terms(grad=x.T))),
        (TypeError, "grad", lambda: TRITON.accumulate(x, Terms(grad=x.int()))),
        (ValueError, "grad", lambda: TRITON.accumulate(x, Terms(grad=x.to("meta")))),
        (ValueError, "bits", lambda: TRITON.quantize(x, book, layout(5))),
        (ValueError, "codebook", lambda: TRITON.quantize(x, codebooks(8)[0], layout(4))),
        (ValueError, "terms", lambda: update(None)),
        (ValueError, "terms", lambda: update(x, weight=1.0)),
        (TypeError, "grad", lambda: update(x.double())),
        (ValueError, "scales", lambda: update(x, scales=torch.empty(4, 2))),
        (TypeError, "out", lambda: update(x, out=x.double())),
        (ValueError, "out", lambda: update(x, out=x)),
        (ValueError, "packed", lambda: update(x, packed=good.packed)),
        (ValueError, "scales", lambda: update(x, scales=good.scales)),
        (TypeError, "x", lambda: TRITON.rotate(x.double())),
        (ValueError, "x", lambda: TRITON.rotate(x.T)),
    ]
    for error, parameter, call in cases:
        with pytest.raises(error, match=f"^{parameter}: expected .* got "):
            call()


def test_autograd_hears_of_changes() -> None:
    weight = torch.ones(3, 4)
    one = torch.ones(1)
    version = weight._version
    TRITON.update_weight(weight, weight.clone(), decay=one, step_size=one)
    assert weight._version > version
