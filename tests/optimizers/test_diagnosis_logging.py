"""log_diagnoses: when, what, and to which loggers."""

from __future__ import annotations

import copy
import importlib.util
import logging
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowbit_muon import (
    Muon,
    MuonWithAuxAdam,
    attach_gradient_release,
    log_diagnoses,
    muon_param_groups,
)

HAS_TENSORBOARD = importlib.util.find_spec("tensorboard") is not None
FIGURES = ("direction_error", "effective_rank", "stable_rank", "end_codes")


class Recorder:
    """A logger that is a function, with its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[dict[str, float], int]] = []

    def __call__(self, values: Mapping[str, float], step: int) -> None:
        self.calls.append((dict(values), step))

    @property
    def steps(self) -> list[int]:
        return [step for _, step in self.calls]


def make(state_format: str = "spectral4") -> tuple[nn.Module, MuonWithAuxAdam]:
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    groups = muon_param_groups(model)
    return model, MuonWithAuxAdam(groups, state_format=state_format, aux_adam="adamw")


def backward(model: nn.Module) -> Tensor:
    loss: Tensor = model(torch.randn(5, 8)).square().mean()
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()


def test_every_so_many_steps_and_not_before_the_first() -> None:
    for every, expected in ((1, [1, 2, 3, 4, 5, 6]), (3, [3, 6]), (7, [])):
        model, optimizer = make()
        logger = Recorder()
        log_diagnoses(optimizer, logger, every=every)
        train(model, optimizer, 7)
        assert logger.steps == expected


def test_the_scalars_are_those_of_diagnose() -> None:
    model, optimizer = make()
    logger = Recorder()
    log_diagnoses(optimizer, logger, every=2)
    train(model, optimizer, 2)
    backward(model)
    rows = optimizer.diagnose()
    optimizer.step()
    ((found, step),) = logger.calls
    assert step == 2
    expected = {f"muon/{row.name}/{f}": getattr(row, f) for row in rows for f in FIGURES}
    expected |= {f"muon/{row.name}/skipped": 0.0 for row in rows}
    for figure in FIGURES:
        values = [getattr(row, figure) for row in rows]
        expected[f"muon/{figure}_median"] = statistics.median(values)
        expected[f"muon/{figure}_max"] = max(values)
    expected |= {"muon/skipped_sum": 0.0, "muon/with_gradient": 1.0}
    assert found == expected
    assert {row.name for row in rows} == {"0.weight", "2.weight"}
    assert all(type(value) is float for value in found.values())


def test_only_what_is_over_all_matrices_under_another_prefix() -> None:
    model, optimizer = make()
    logger = Recorder()
    log_diagnoses(optimizer, logger, every=2, prefix="a/b", per_matrix=False)
    train(model, optimizer, 3)
    ((found, _),) = logger.calls
    tags = {f"a/b/{figure}_{kind}" for figure in FIGURES for kind in ("median", "max")}
    assert set(found) == tags | {"a/b/skipped_sum", "a/b/with_gradient"}


def test_what_has_no_value_is_left_out() -> None:
    param = nn.Parameter(torch.ones(4, 8))
    optimizer = Muon([("w", param)], state_format="fp32")
    logger = Recorder()
    log_diagnoses(optimizer, logger, every=1)
    for _ in range(2):
        param.grad = torch.zeros(4, 8)
        optimizer.step()
    ((found, _),) = logger.calls
    assert not any("end_codes" in tag or "direction_error" in tag for tag in found)
    assert found["muon/w/effective_rank"] == 0.0


@pytest.mark.filterwarnings("ignore:a gradient of a parameter:RuntimeWarning")
def test_skipped_gradients_count_as_steps_and_are_logged() -> None:
    param = nn.Parameter(torch.ones(4, 8))
    optimizer = Muon([("w", param)])
    logger = Recorder()
    log_diagnoses(optimizer, logger, every=1)
    for value in (1.0, float("nan"), 1.0):
        param.grad = torch.randn(4, 8) * value
        optimizer.step()
    assert logger.steps == [1, 2]
    # The gradient of the second step is not one; at the third it has been skipped.
    first, second = (values for values, _ in logger.calls)
    assert (first["muon/with_gradient"], second["muon/with_gradient"]) == (0.0, 1.0)
    assert (first["muon/skipped_sum"], second["muon/skipped_sum"]) == (0.0, 1.0)
    assert second["muon/w/skipped"] == 1.0


def test_training_is_the_same_with_it() -> None:
    model, optimizer = make()
    twin = copy.deepcopy(model)
    other = MuonWithAuxAdam(muon_param_groups(twin), aux_adam="adamw")
    log_diagnoses(optimizer, Recorder(), every=1)
    for trained, by in ((model, optimizer), (twin, other)):
        torch.manual_seed(1)
        train(trained, by, 4)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_batches_of_an_accumulation_are_one_step() -> None:
    model, optimizer = make()
    logger = Recorder()
    log_diagnoses(optimizer, logger, every=2)
    for batch in range(12):
        backward(model)
        if batch % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    assert logger.steps == [2]


def test_steps_go_on_from_a_loaded_state() -> None:
    model, optimizer = make()
    train(model, optimizer, 5)
    resumed = MuonWithAuxAdam(muon_param_groups(model), aux_adam="adamw")
    logger = Recorder()
    log_diagnoses(resumed, logger, every=4)
    resumed.load_state_dict(optimizer.state_dict())
    train(model, resumed, 8)
    assert logger.steps == [8, 12]


def test_a_step_of_ones_own() -> None:
    model, optimizer = make()
    logger = Recorder()
    steps = iter((100, 250))
    log_diagnoses(optimizer, logger, every=2, step=lambda: next(steps))
    train(model, optimizer, 5)
    assert logger.steps == [100, 250]


@pytest.mark.parametrize("by_name", [False, True])
def test_a_closure_makes_the_gradients_first(by_name: bool) -> None:
    model, optimizer = make()
    usual_model = copy.deepcopy(model)
    usual = MuonWithAuxAdam(muon_param_groups(usual_model), aux_adam="adamw")
    logger, usual_logger = Recorder(), Recorder()
    log_diagnoses(optimizer, logger, every=2)
    log_diagnoses(usual, usual_logger, every=2)

    def closure() -> float:
        optimizer.zero_grad()
        return float(backward(model).detach())

    torch.manual_seed(1)
    for _ in range(5):
        loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
        assert isinstance(loss, float)
    torch.manual_seed(1)
    train(usual_model, usual, 5)
    assert logger.calls == usual_logger.calls
    assert len(logger.calls) == 2


def test_under_gradient_release_it_is_an_estimate() -> None:
    model, optimizer = make()
    attach_gradient_release(model, optimizer)
    logger = Recorder()
    log_diagnoses(optimizer, logger, every=2)
    train(model, optimizer, 5)
    assert len(logger.calls) == 2
    assert all(values["muon/with_gradient"] == 0.0 for values, _ in logger.calls)


def test_removed_it_logs_no_more() -> None:
    model, optimizer = make()
    logger = Recorder()
    handle = log_diagnoses(optimizer, logger, every=1)
    train(model, optimizer, 3)
    handle.remove()
    train(model, optimizer, 3)
    assert logger.steps == [1, 2]


# Loggers --------------------------------------------------------------------------------------


class LikeSummaryWriter:
    """TensorBoard's writer: `torch.utils.tensorboard.SummaryWriter.add_scalar`."""

    def __init__(self) -> None:
        self.found: dict[int, dict[str, float]] = {}

    def add_scalar(
        self,
        tag: str,
        scalar_value: float,
        global_step: int | None = None,
        walltime: float | None = None,
        new_style: bool = False,
        double_precision: bool = False,
    ) -> None:
        assert global_step is not None
        assert walltime is None
        self.found.setdefault(global_step, {})[tag] = scalar_value


class LikeRun:
    """W&B's run and module: `wandb.log`."""

    def __init__(self) -> None:
        self.found: dict[int, dict[str, float]] = {}

    def log(
        self, data: dict[str, Any], step: int | None = None, commit: bool | None = None
    ) -> None:
        assert step is not None
        assert commit is None
        self.found[step] = dict(data)


class LikeLightningLogger:
    """Lightning's loggers, which also have a `log_graph` and more, but no `log`."""

    def __init__(self) -> None:
        self.found: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.found[step] = dict(metrics)


@pytest.mark.parametrize("make_logger", [LikeSummaryWriter, LikeRun, LikeLightningLogger])
def test_loggers_get_what_a_function_gets(make_logger: Callable[[], Any]) -> None:
    model, optimizer = make()
    function, logger = Recorder(), make_logger()
    log_diagnoses(optimizer, function, every=2)
    log_diagnoses(optimizer, logger, every=2)
    train(model, optimizer, 5)
    assert logger.found == {step: values for values, step in function.calls}
    assert list(logger.found) == [2, 4]


@pytest.mark.skipif(not HAS_TENSORBOARD, reason="tensorboard is not installed")
def test_tensorboard_itself(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model, optimizer = make()
    function = Recorder()
    log_diagnoses(optimizer, function, every=2)
    with SummaryWriter(str(tmp_path)) as writer:
        log_diagnoses(optimizer, writer, every=2)
        train(model, optimizer, 3)
    events = EventAccumulator(str(tmp_path)).Reload()
    ((values, _),) = function.calls
    for tag, value in values.items():
        ((event,),) = [events.Scalars(tag)]
        assert (event.step, event.value) == (2, pytest.approx(value))


@pytest.mark.long  # seconds to import Lightning for one call
def test_a_logger_of_lightning(tmp_path: Path) -> None:
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    model, optimizer = make()
    logger = loggers.CSVLogger(str(tmp_path))
    log_diagnoses(optimizer, logger, every=2)
    train(model, optimizer, 3)
    logger.save()
    (file,) = tmp_path.rglob("metrics.csv")
    heading, values = file.read_text().splitlines()
    assert "muon/0.weight/direction_error" in heading.split(",")
    assert values.split(",")[heading.split(",").index("step")] == "2"


# Mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "logger", "every", "error", "message"),
    [
        ("adam", print, 1, TypeError, "optimizer: expected a Muon or MuonWithAuxAdam, got AdamW"),
        ("muon", print, 0, ValueError, "every: expected a whole number >= 1, got 0"),
        ("muon", print, 2.0, ValueError, "every: expected a whole number >= 1, got 2.0"),
        ("muon", print, True, ValueError, "every: expected a whole number >= 1, got True"),
        ("muon", "runs", 1, TypeError, "logger: expected add_scalar .* got str"),
        ("muon", logging.getLogger("x"), 1, TypeError, "logger: expected .* got Logger"),
    ],
)
def test_wrong_arguments(
    optimizer: str, logger: Any, every: Any, error: type[Exception], message: str
) -> None:
    params = [nn.Parameter(torch.ones(4, 8))]
    made = Muon(params) if optimizer == "muon" else torch.optim.AdamW(params)
    with pytest.raises(error, match=message):
        log_diagnoses(made, logger, every=every)
