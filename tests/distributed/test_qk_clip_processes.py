"""QK-clip where several processes train a model: all clip alike, and each what it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from attention_model import SIZE, Model, exact_logits, inputs, make_muon, standing_still, step
from several_processes import run
from torch.nn.parallel import DistributedDataParallel

from lowbit_muon import Muon, attach_qk_clip


def run_shared(rank: int) -> dict[str, Any]:
    """Two processes with other data: what each saw, and what was left of the weights."""
    model = Model(layers=1)
    group = dist.group.WORLD
    optimizer = make_muon(model, process_group=group)
    wrapped = DistributedDataParallel(model)
    messages = []
    for asked in optimizer, standing_still(model):
        with pytest.raises(ValueError, match="process_group: expected the processes") as error:
            attach_qk_clip(wrapped, asked)
        messages.append(str(error.value))
    own = exact_logits(model.layers[0], inputs(rank)).float()
    clip = attach_qk_clip(wrapped, optimizer, 0.5, process_group=group)
    model.layers[0].clip = clip
    step(wrapped, optimizer, inputs(rank))
    weights = {name: param.detach() for name, param in model.named_parameters()}
    return {"own": own, "seen": clip.max_logits, "clipped": clip.clipped_heads, "weights": weights}


def test_processes_clip_by_the_largest_logit_of_all(tmp_path: Path) -> None:
    first, second = run(2, _ranked, tmp_path, "run_shared")
    assert not torch.equal(first["own"], second["own"])
    expected = torch.maximum(first["own"], second["own"])
    for result in first, second:
        torch.testing.assert_close(result["seen"]["layers.0"], expected)
        assert result["clipped"]
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name


def run_sharded(rank: int) -> dict[str, Any]:
    """The same by FSDP2, whose processes hold parts of the weights, in bfloat16, compensated."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = Model(layers=1, heads=3, key_heads=3).bfloat16()  # 12 rows over 2 processes
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    matrices = [param for param in model.parameters() if param.ndim == 2]
    others = [param for param in model.parameters() if param.ndim < 2]
    optimizer = Muon(matrices, lr=0.0, weight_decay=0.0, compensation=True)
    with pytest.raises(ValueError, match="process_group: expected the processes"):
        attach_qk_clip(model, optimizer)
    clip = attach_qk_clip(model, optimizer, 0.5, process_group=dist.group.WORLD)
    model.layers[0].clip = clip
    old = {name: param.full_tensor().clone() for name, param in model.named_parameters()}
    model(inputs(rank).bfloat16()).square().mean().backward()
    optimizer.step()
    states = [optimizer.state[param] for param in matrices]
    remainders = [bool(state["remainder"].any()) for state in states if "remainder" in state]
    new = {name: param.full_tensor() for name, param in model.named_parameters()}
    seen = clip.max_logits
    return {"old": old, "new": new, "seen": seen, "remainders": remainders, "n": len(others)}


def test_each_process_scales_its_own_part_of_a_weight(tmp_path: Path) -> None:
    results = run(2, _ranked, tmp_path, "run_sharded")
    for result in results:
        seen = result["seen"]["layers.0"]
        assert torch.equal(seen, results[0]["seen"]["layers.0"])
        root = (0.5 / seen).clamp(max=1.0).sqrt().repeat_interleave(SIZE)
        assert (root < 1).any()
        assert any(result["remainders"])
        for name, old in result["old"].items():
            new = result["new"][name]
            if "q_proj" in name or "k_proj" in name:
                factors = root if old.ndim == 1 else root[:, None]
                # What was left over of the old bfloat16 weight, and the rounding of the new one,
                # are at most 2^-9 of it each.
                torch.testing.assert_close(new.float(), old.float() * factors, rtol=2**-8, atol=0)
            else:
                assert torch.equal(new, old), name


def run_copies(rank: int) -> None:
    model = Model(layers=1).bfloat16()
    matrices = [param for param in model.parameters() if param.ndim == 2]
    group = dist.group.WORLD
    optimizer = Muon(matrices, compensation=True, process_group=group)
    with pytest.raises(ValueError, match=r"^layers\.0\.q_proj\.weight: expected no compensation"):
        attach_qk_clip(model, optimizer, process_group=group)


def test_compensation_of_copied_weights_is_refused(tmp_path: Path) -> None:
    run(2, _ranked, tmp_path, "run_copies")


def _ranked(name: str) -> Any:
    return globals()[name](dist.get_rank())
