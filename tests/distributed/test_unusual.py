"""Shared parameters in unusual memory, groups, devices and states."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from device_reference import DeviceReference
from several_processes import run
from test_sharded_step import gradient, start, train, whole
from torch import Tensor, nn
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)

from lowbit_muon import Muon, MuonWithAuxAdam, NonFiniteGradientError, muon_param_groups
from lowbit_muon.optimizers import muon as muon_module


def shard(tensor: Tensor, dim: int = 0) -> DTensor:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return distribute_tensor(tensor, mesh, [Shard(dim)], src_data_rank=None)


def summed_gradient(with_group: bool) -> Tensor:
    """A copy on each process, and a batch in parts: autograd leaves the terms of a sum."""
    mesh = init_device_mesh("cpu", (2,))
    weight = nn.Parameter(
        distribute_tensor(start((8, 12), 0), mesh, [Replicate()], src_data_rank=None)
    )
    batch = distribute_tensor(start((6, 12), 1), mesh, [Shard(0)], src_data_rank=None)
    (batch @ weight.t()).square().sum().backward()
    assert weight.grad is not None
    assert weight.grad.placements[0].is_partial()  # or this test would say nothing
    optimizer = Muon(
        [weight],
        lr=0.1,
        state_format="fp32",
        process_group=dist.group.WORLD if with_group else None,
    )
    optimizer.step()
    return whole(weight)


@pytest.mark.parametrize("with_group", [False, True])
def test_terms_of_a_gradient_are_summed(with_group: bool, tmp_path: Path) -> None:
    weight = nn.Parameter(start((8, 12), 0))
    (start((6, 12), 1) @ weight.t()).square().sum().backward()
    Muon([weight], lr=0.1, state_format="fp32").step()
    for found in run(2, summed_gradient, tmp_path, with_group):
        # The gradient's sums in another order, lifted by up to 485 (tests of the device step).
        torch.testing.assert_close(found, weight.detach(), rtol=0, atol=485 * 2.0**-22)


_IN_MEMORY = (
    lambda x: x.contiguous(memory_format=torch.channels_last),
    lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2).mT.contiguous().mT,
)
_KERNEL = (8, 3, 2, 2)


def kernels_in_parts(layout: int, compensation: bool) -> Tensor:
    dtype = torch.bfloat16 if compensation else torch.float32
    mesh = init_device_mesh("cpu", (2,))
    rows = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    local = _IN_MEMORY[layout](start(_KERNEL, 0)[rows].to(dtype))
    param = nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)]))
    optimizer = Muon([param], lr=0.1, compensation=compensation)
    for step in range(3):
        param.grad = DTensor.from_local(start(_KERNEL, step)[rows].to(dtype), mesh, [Shard(0)])
        optimizer.step()
    assert param.to_local().stride() == local.stride()
    return whole(param)


@pytest.mark.parametrize("compensation", [False, True])
@pytest.mark.parametrize("layout", range(len(_IN_MEMORY)))
def test_parts_that_lie_in_another_order_in_memory(
    layout: int, compensation: bool, tmp_path: Path
) -> None:
    dtype = torch.bfloat16 if compensation else torch.float32
    weight = nn.Parameter(start(_KERNEL, 0).to(dtype))
    optimizer = Muon([weight], lr=0.1, compensation=compensation)
    for step in range(3):
        weight.grad = start(_KERNEL, step).to(dtype)
        optimizer.step()
    for found in run(2, kernels_in_parts, tmp_path, layout, compensation):
        # A shard subtracts the update after the decay, where a whole one does both in one product:
        # one rounding more of the weight, 2 eps of it for either side. Of updates of at most
        # 0.1 * sqrt(12/8) = 0.12 in each of three steps float32 rounds away 3 * 0.12 * eps / 2
        # = 2e-8, which Newton-Schulz lifts by its first factors (3.4^3 = 41): 1e-6.
        torch.testing.assert_close(
            found, weight.detach(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6
        )


def sliced() -> Tensor:
    weight = nn.Parameter(start((8, 20), 0)[:, :12])
    optimizer = Muon([weight], lr=0.1, process_group=dist.group.WORLD)
    train([weight], optimizer, lambda grad: grad)
    return weight.detach().clone()


def test_weights_with_gaps_in_memory_are_sent_as_they_are(tmp_path: Path) -> None:
    weight = nn.Parameter(start((8, 20), 0)[:, :12])
    train([weight], Muon([weight], lr=0.1), lambda grad: grad)
    for found in run(2, sliced, tmp_path):
        assert torch.equal(found, weight)


def saved_on_a_device(folder: str) -> tuple[int, bool]:
    muon_module.get_backend = lambda *_: DeviceReference()  # type: ignore[assignment]
    params = [nn.Parameter(start((8, 12), i)) for i in range(3)]
    optimizer = Muon(params, process_group=dist.group.WORLD)
    train(params, optimizer, lambda grad: grad, range(2))
    state = optimizer.state_dict()
    held = copy.deepcopy(state["state"][0])
    dcp.save({"optimizer": state}, checkpoint_id=folder)
    train(params, optimizer, lambda grad: grad, range(2, 3))
    same = all(
        torch.equal(whole(value), whole(state["state"][0][key]))
        for key, value in held.items()
        if isinstance(value, Tensor)
    )
    return state["state"][0]["step"], same


def test_a_state_of_a_device_is_saved_and_stays_as_it_was(tmp_path: Path) -> None:
    folder = str(tmp_path / "saved")
    assert run(2, saved_on_a_device, tmp_path / "run", folder) == [(2, True), (2, True)]


def bad_adam_gradient() -> str:
    matrix, vector = nn.Parameter(shard(start((8, 12), 0))), nn.Parameter(shard(start((8,), 1)))
    groups = [{"params": [vector], "use_muon": False}, {"params": [matrix], "use_muon": True}]
    optimizer = MuonWithAuxAdam(groups, nonfinite="raise")
    matrix.grad, vector.grad = shard(start((8, 12), 2)), shard(start((8,), 3))
    if dist.get_rank() == 1:
        vector.grad.to_local()[0] = float("nan")
    with pytest.raises(NonFiniteGradientError) as caught:
        optimizer.step()
    dist.barrier()  # still in step with each other
    return str(caught.value)


def test_a_bad_part_of_adamws_raises_on_all(tmp_path: Path) -> None:
    assert len(run(2, bad_adam_gradient, tmp_path, seconds=60)) == 2


def skipped_adam_gradient() -> tuple[int, int]:
    """Nan in a part of one process, whichever it is."""
    vectors = [nn.Parameter(shard(start((8,), i))) for i in range(2)]
    group = {"params": vectors, "use_muon": False, "aux_adam": "adamw"}
    optimizer = MuonWithAuxAdam([group])
    for number, vector in enumerate(vectors):
        vector.grad = shard(start((8,), 3))
        if dist.get_rank() == number:
            vector.grad.to_local()[0] = float("nan")
    optimizer.step()
    assert all(whole(vector).isfinite().all() for vector in vectors)
    return tuple(optimizer.state[vector]["skipped"] for vector in vectors)  # type: ignore[return-value]


@pytest.mark.filterwarnings("ignore:a gradient of a parameter")
def test_a_bad_part_of_adamws_is_skipped_on_all(tmp_path: Path) -> None:
    assert run(2, skipped_adam_gradient, tmp_path, seconds=60) == [(1, 1), (1, 1)]


def changed_group() -> str:
    params = [nn.Parameter(start((8, 12), i)) for i in range(3)]
    optimizer = Muon(params[:2], process_group=dist.group.WORLD)
    train(params[:2], optimizer, lambda grad: grad, range(1))
    optimizer.param_groups[0]["params"].append(params[2])
    with pytest.raises(ValueError, match="add_param_group") as caught:
        optimizer.state_dict()
    optimizer.param_groups[0]["params"].pop()
    optimizer.add_param_group({"params": [params[2]]})
    train(params, optimizer, lambda grad: grad, range(1, 2))
    return str(caught.value)


def test_a_group_that_changes_is_refused_and_another_is_not(tmp_path: Path) -> None:
    for message in run(2, changed_group, tmp_path):
        assert "group 0" in message


def small_groups() -> int:
    params = [nn.Parameter(start((6, 6), i)) for i in range(6)]
    groups = [{"params": [param]} for param in params]
    optimizer = Muon(groups, process_group=dist.group.WORLD, state_format="fp32")
    train(params, optimizer, lambda grad: grad, range(1))
    return optimizer.state_bytes()


def test_owners_are_balanced_over_groups(tmp_path: Path) -> None:
    assert run(2, small_groups, tmp_path) == [3 * 4 * 36, 3 * 4 * 36]


def different(what: str) -> str:
    second = dist.get_rank() == 1
    options: dict[str, Any] = {}
    shape, dim = (8, 12), 0
    if what == "auto":
        options["state_format"] = "auto" if second else "spectral4"
    elif what == "update_dtype":
        options["update_dtype"] = "int8" if second else "float32"
    elif what == "part":
        shape, dim, options["batch_experts"] = (3, 1, 12), 1, True
    param = nn.Parameter(shard(start(shape, 0), dim))
    optimizer = Muon([("w", param)], **options)
    param.grad = shard(gradient(shape, 0, 0), dim)
    with pytest.raises(ValueError, match="w: ") as caught:
        optimizer.step()
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("auto", "same state_format"),
        ("update_dtype", "same update_dtype"),
        ("part", "sharded along the rows or columns"),
    ],
)
def test_what_only_one_process_sees_is_an_error_on_all(
    what: str, message: str, tmp_path: Path
) -> None:
    for found in run(2, different, tmp_path, what, seconds=60):
        assert message in found


def refused_at_once() -> list[str]:
    messages = []
    param = nn.Parameter(start((8, 12), 0))
    optimizer = Muon([param], process_group=dist.group.WORLD, ns_dtype="float16")
    param.grad = start((8, 12), 1)
    with pytest.raises(ValueError, match="ns_dtype") as caught:
        optimizer.step()
    messages.append(str(caught.value))
    with pytest.raises(TypeError, match="state_dict") as copied:
        copy.deepcopy(optimizer)
    return [*messages, str(copied.value)]


def test_options_and_copies_are_checked_before_a_step(tmp_path: Path) -> None:
    for messages in run(2, refused_at_once, tmp_path):
        assert len(messages) == 2


def copies_with_remainders() -> int:
    mesh = init_device_mesh("cpu", (2,))
    place = [Replicate()]
    weight = nn.Parameter(
        distribute_tensor(start((8, 12), 0).bfloat16(), mesh, place, src_data_rank=None)
    )
    optimizer = Muon(
        [weight], process_group=dist.group.WORLD, compensation=True, state_format="fp32"
    )
    weight.grad = distribute_tensor(start((8, 12), 1).bfloat16(), mesh, place, src_data_rank=None)
    optimizer.step()
    saved = whole(optimizer.state_dict()["state"][0]["remainder"])
    assert saved.any()
    return optimizer.state_bytes()


def test_remainders_of_copies_are_the_owners(tmp_path: Path) -> None:
    assert sorted(run(2, copies_with_remainders, tmp_path)) == [0, (4 + 1) * 8 * 12]


def automatic_beside_parts() -> tuple[list[int], int]:
    plain, parts = nn.Parameter(start((8, 12), 0)), nn.Parameter(shard(start((8, 12), 1)))
    groups = [{"params": [parts]}, {"params": [plain], "state_format": "auto"}]
    states = Muon(groups).state_dict()["state"]
    return sorted(states), int(states[1]["state_format"].sum())


def test_a_state_before_the_first_step_leaves_formats_to_it(tmp_path: Path) -> None:
    assert run(2, automatic_beside_parts, tmp_path) == [([0, 1], 0)] * 2


def messages_of_fsdp1(use_orig_params: bool) -> list[str]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(
        nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)),
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )
    messages = []
    for make in (lambda: muon_param_groups(model), lambda: Muon(model.parameters())):
        with pytest.raises(ValueError, match="expected") as caught:
            make()
        messages.append(str(caught.value))
    if use_orig_params:
        with FullyShardedDataParallel.summon_full_params(model):
            optimizer = MuonWithAuxAdam(muon_param_groups(model), aux_adam="adamw")
        model(torch.randn(8, 32)).square().mean().backward()
        with pytest.raises(ValueError, match="expected") as caught:
            optimizer.step()
        messages.append(str(caught.value))
    return messages


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_is_told_of_fsdp2(use_orig_params: bool, tmp_path: Path) -> None:
    for messages in run(2, messages_of_fsdp1, tmp_path, use_orig_params):
        for message in messages:
            assert "FSDP1" in message, message
            assert "flattens" in message, message
            assert "fully_shard" in message, message
            assert "AdamW" not in message, message
