"""Bad arguments of QK-clip are named."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_model import (
    SIZE,
    Attention,
    Model,
    attach,
    standing_still,
)
from torch import nn
from torch.optim import SGD

from lowbit_muon import (
    HeadRows,
    Muon,
    QKProjections,
    attach_qk_clip,
)
from lowbit_muon.optimizers import qk_attention


def rows(model: Model, **options: Any) -> Callable[[str, nn.Module], Any]:
    """A `find` that changes the query's rows."""

    def find(name: str, module: nn.Module) -> Any:
        if not isinstance(module, Attention):
            return None
        given = {"projection": module.q_proj, "heads": 4, "size": SIZE, **options}
        return QKProjections(HeadRows(**given), HeadRows(module.k_proj, 4, SIZE))

    return find


BAD_ARGUMENTS = [
    ({"threshold": 0}, ValueError, r"threshold: expected a number > 0, got 0"),
    ({"threshold": math.inf}, ValueError, r"threshold: expected a number > 0, got inf"),
    ({"threshold": "100"}, ValueError, r"threshold: expected a number > 0, got '100'"),
    ({"alpha": 1.5}, ValueError, r"alpha: expected a number in \[0, 1\], got 1\.5"),
    ({"process_group": "all"}, TypeError, r"process_group: expected one of torch.distributed"),
    ({"find": lambda *_: None}, ValueError, r"got none in Model; say where they are with find="),
    ({"find": lambda name, _: 3}, TypeError, r"Model: expected QKProjections or None from find"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = Model()
    optimizer = standing_still(model)
    with pytest.raises(error, match=message):
        attach_qk_clip(model, optimizer, **options)
    assert not optimizer._optimizer_step_post_hooks
    assert not any(qk_attention.recorder_of(layer) for layer in model.layers)


BAD_ROWS = [
    ({"heads": 5}, ValueError, r"layers\.0: query: expected heads within the 16 outputs .* 5 of 4"),
    ({"start": 1}, ValueError, r"layers\.0: query: expected heads within the 16 outputs"),
    ({"size": 0}, ValueError, r"layers\.0: query: expected heads within"),
    ({"stride": 3}, ValueError, r"layers\.0: query: expected heads within .* 3 apart"),
    (
        {"heads": 3},
        ValueError,
        r"layers\.0: expected a number of key heads that div.* 3 query",
    ),
    ({"projection": nn.Identity()}, TypeError, r"layers\.0: query: .*got torch.nn.*Identity"),
    ({"projection": 3}, TypeError, r"layers\.0: query: expected a projection .*got builtins\.int"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_ROWS)
def test_heads_that_do_not_fit_are_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = Model()
    with pytest.raises(error, match=message):
        attach_qk_clip(model, standing_still(model), find=rows(model, **options))


def test_projections_that_cannot_be_scaled_are_named() -> None:
    model = Model()
    optimizer = standing_still(model)
    with pytest.raises(TypeError, match="optimizer: expected a torch Optimizer, got Model"):
        attach_qk_clip(model, model)  # type: ignore[arg-type]
    model.layers[1].k_proj.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"^layers\.1\.k_proj\.weight: expected .* got a frozen"):
        attach_qk_clip(model, optimizer)
    model.layers[1].k_proj.weight.requires_grad_(True)
    few = SGD([p for n, p in model.named_parameters() if n != "layers.1.q_proj.weight"], lr=0.1)
    with pytest.raises(ValueError, match=r"^layers\.1\.q_proj\.weight: .*of the optimizer"):
        attach_qk_clip(model, few)
    matrices = [param for param in model.parameters() if param.ndim == 2]
    attach_qk_clip(model, SGD(matrices, lr=0.1)).detach()  # biases are another optimizer's
    model.layers[1].q_proj = nn.utils.parametrizations.weight_norm(model.layers[1].q_proj)
    with pytest.raises(TypeError, match=r"layers\.1: query: .*a weight of its own.*got none"):
        attach_qk_clip(model, optimizer)
    model = Model()
    model.layers[1].q_proj.weight = model.layers[0].q_proj.weight
    with pytest.raises(ValueError, match=r"^layers\.1\.q_proj\.weight: .*layers\.0\.q_proj"):
        attach_qk_clip(model, standing_still(model))


def test_gains_that_would_undo_a_clip_are_refused() -> None:
    model = Model()
    matrices = [param for param in model.parameters() if param.ndim == 2]
    with pytest.raises(ValueError, match=r"q_proj\.weight: .*'muown', whose gains would bring"):
        attach_qk_clip(model, Muon(matrices, rule="muown"))
    attach_qk_clip(model, Muon(matrices, rule="md_decoupling")).detach()


def test_normalised_queries_are_refused_by_name() -> None:
    model = Model()
    model.layers[1].q_norm = nn.RMSNorm(SIZE)
    with pytest.raises(ValueError, match=r"layers\.1: .* got Attention with q_norm, behind"):
        attach_qk_clip(model, standing_still(model))


def test_what_is_recorded_has_to_fit() -> None:
    model = Model(key_heads=2)
    clip = attach(model, standing_still(model))
    query, key = torch.randn(2, 4, 5, SIZE), torch.randn(2, 2, 5, SIZE)
    clip.record("layers.1", query, key)
    clip.record("layers.1", query, key.repeat_interleave(2, 1))

    def check(
        message: str, *args: Any, error: type[Exception] = ValueError, **options: Any
    ) -> None:
        with pytest.raises(error, match=message):
            clip.record(*args, **options)

    check(r"layer: expected one of \['layers.0', 'layers.1'\]", "layers.2", query, key)
    check("layer: .* got a Linear", model.layers[0].q_proj, query, key)
    check(r"layers\.1: expected queries \[batch, 4, .*got \(2, 2, 5, 4\)", "layers.1", key, key)
    check(r"layers\.1: expected queries", "layers.1", query[0], key[0])
    check(r"layers\.1: expected queries", "layers.1", query, key[:1])
    check(r"layers\.1: .*as many keys", "layers.1", query, key[:, :, :3], causal=True)
    check(r"layers\.1: expected a scale > 0, got -1", "layers.1", query, key, scale=-1)
    check(r"layers\.1: .*mask.*got list", "layers.1", query, key, mask=[1], error=TypeError)
    check(r"layers\.1: expected a mask that fits", "layers.1", query, key, mask=torch.ones(2, 4))
    check(r"layers\.1: expected a mask that fits", "layers.1", query, key, mask=torch.ones(5))
