"""`optimizer.diagnose()` as curves: in TensorBoard, W&B, Lightning's loggers or a function."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lowbit_muon.optimizers.muon import Muon
from lowbit_muon.optimizers.step_hooks import Arguments, when_gradients_are_there
from lowbit_muon.state.diagnosis import Diagnosis

Write = Callable[[Mapping[str, float], int], object]


def log_diagnoses(
    optimizer: Optimizer,
    logger: Any,
    *,
    every: int,
    prefix: str = "muon",
    per_matrix: bool = True,
    step: Callable[[], int] | None = None,
) -> RemovableHandle:
    """Log the optimizer's diagnosis before every `every`-th step, while its gradients are there::

        handle = log_diagnoses(optimizer, SummaryWriter("runs/a"), every=500)  # TensorBoard
        log_diagnoses(optimizer, wandb, every=500, step=lambda: wandb.run.step)
        log_diagnoses(optimizer, lambda scalars, step: trainer.log(scalars), every=500)

    The last line is for transformers' Trainer, which logs to all of its `report_to`: write it
    between making the Trainer and `trainer.train()`. Accelerate's wrapped optimizer has ours as
    `.optimizer`; Lightning's loggers are taken as they are. Of several processes with the same
    weights let one log.

    Scalars, for each matrix `muon/<name>/direction_error`, `effective_rank`, `stable_rank`,
    `end_codes` and `skipped` (`lowbit_muon.Diagnosis` says what they are); over all matrices
    `muon/direction_error_median`, `muon/direction_error_max` and so on, `muon/skipped_sum`, and
    `muon/with_gradient`, the share of matrices whose error is exact: 0 under
    `attach_gradient_release`, which has freed the gradients by then.

    Cost: a singular value decomposition and two orthogonalisations a matrix, on its own device,
    which is waited for. On a CPU that is two to five steps of the optimizer (with `spectral4` on
    one core 2 for 1024x1024, 3 for 576x1536, 4.6 for 1024x4096), so let `every` be a hundred or
    more. Nothing is changed.

    Steps are those of the optimizer, so that batches of an accumulation count as one; they go on
    from the state that was loaded. Before the first step there is no momentum, and nothing to log.

    Args:
        optimizer: a `Muon` or `MuonWithAuxAdam`; matrices of AdamW are left out.
        logger: an object with `add_scalar(tag, value, step)` (TensorBoard's SummaryWriter), with
            `log_metrics(dict, step=)` (Lightning) or with `log(dict, step=)` (W&B's module or run,
            Accelerator), tried in this order, or a function of (dict, step).
        every: steps between two diagnoses.
        prefix: first part of every tag.
        per_matrix: also each matrix, not only what is over all of them.
        step: what to give the logger for the step, called for each diagnosis; default: steps that
            the optimizer has taken. W&B drops what comes with a smaller step than before.

    Returns a handle; `handle.remove()` ends the logging.

    Raises TypeError for another optimizer or logger, ValueError for `every` below 1.
    """
    if not isinstance(optimizer, Muon):
        raise TypeError(
            f"optimizer: expected a Muon or MuonWithAuxAdam, got {type(optimizer).__name__}"
        )
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"every: expected a whole number >= 1, got {every!r}")
    log = _DiagnosisLog(optimizer, _writer(logger), every, prefix, per_matrix, step)
    return optimizer.register_step_pre_hook(log.before_step)


@dataclass
class _DiagnosisLog:
    """The hook of `log_diagnoses`, with its arguments."""

    optimizer: Muon
    write: Write
    every: int
    prefix: str
    per_matrix: bool
    step: Callable[[], int] | None
    taken: int | None = None  # steps of the optimizer; None before its next one

    def before_step(
        self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        # Counted here after the first look: on a GPU the state's own counts are waited for.
        self.taken = steps_taken(self.optimizer) if self.taken is None else self.taken + 1
        if self.taken == 0 or self.taken % self.every:
            return None
        return when_gradients_are_there(args, kwargs, self._log)

    def _log(self) -> None:
        rows = self.optimizer.diagnose()
        step = self.taken if self.step is None else self.step()
        if rows and step is not None:
            self.write(scalars(rows, self.prefix, self.per_matrix), step)


def steps_taken(optimizer: Muon) -> int:
    """Steps of the parameter that had most: some may have had no gradient in some."""
    return max(
        (int(state["step"]) + int(state["skipped"]) for state in optimizer.state.values() if state),
        default=0,
    )


def scalars(rows: Sequence[Diagnosis], prefix: str, per_matrix: bool = True) -> dict[str, float]:
    """{tag: value} of diagnoses; what a matrix has no value for is left out."""
    found: dict[str, float] = {}
    for figure in ("direction_error", "effective_rank", "stable_rank", "end_codes"):
        known = [row for row in rows if getattr(row, figure) is not None]
        values = [float(getattr(row, figure)) for row in known]
        if values:
            found[f"{prefix}/{figure}_median"] = statistics.median(values)
            found[f"{prefix}/{figure}_max"] = max(values)
        if per_matrix:
            tags = [f"{prefix}/{row.name}/{figure}" for row in known]
            found |= dict(zip(tags, values, strict=True))
    found[f"{prefix}/skipped_sum"] = float(sum(row.skipped for row in rows))
    found[f"{prefix}/with_gradient"] = statistics.fmean(row.with_gradient for row in rows)
    if per_matrix:
        found |= {f"{prefix}/{row.name}/skipped": float(row.skipped) for row in rows}
    return found


def _writer(logger: Any) -> Write:
    """How this logger takes scalars of one step."""
    if hasattr(logger, "add_scalar"):

        def add_scalars(values: Mapping[str, float], step: int) -> None:
            for tag, value in values.items():
                logger.add_scalar(tag, value, step)

        return add_scalars
    if hasattr(logger, "log_metrics"):
        return lambda values, step: logger.log_metrics(values, step=step)
    # Python's own loggers have a `log` of other arguments.
    if hasattr(logger, "log") and not isinstance(logger, logging.Logger):
        return lambda values, step: logger.log(values, step=step)
    if callable(logger):
        return lambda values, step: logger(values, step)
    raise TypeError(
        "logger: expected add_scalar (TensorBoard), log_metrics (Lightning), log(dict, step=) "
        f"(W&B) or a function of (dict, step), got {type(logger).__name__}"
    )
