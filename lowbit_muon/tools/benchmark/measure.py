"""From cases to rows: gates first, then all that passed in turn."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch

from lowbit_muon.formats.presets import PRESETS
from lowbit_muon.tools.benchmark.cases import (
    PARTS,
    Case,
    Prepared,
    Problem,
    UnavailableError,
    make_cases,
)
from lowbit_muon.tools.benchmark.counts import (
    BF16_PRODUCT,
    FP32_PRODUCT,
    FROM_MEMORY,
    IN_L2,
    is_copy,
)
from lowbit_muon.tools.benchmark.peaks import peaks
from lowbit_muon.tools.benchmark.timing import interleaved, medians, spread

SAMPLE_SECONDS = 2e-3  # of calls far below this, several make one sample: clocks and events tick
DETAIL_CHARACTERS = 200  # of a reason: some errors print a whole codebook
Status = Literal["measured", "skipped", "error"]


@dataclass(frozen=True)
class Result:
    """One row of the table and one object in the JSON file (`report.write_results`)."""

    name: str
    shape: tuple[int, int]
    format: str | None
    device: str
    dtype: str
    status: Status
    detail: str = ""
    seconds: list[float] = field(default_factory=list)
    median: float | None = None
    spread: float | None = None
    baseline: str | None = None
    ratio: float | None = None
    error: float | None = None
    allowed_error: float | None = None
    state_bytes: int | None = None
    bits_per_element: float | None = None
    peak_bytes: int | None = None
    threads: int | None = None
    isa: str | None = None
    work: float | None = None
    roof: str | None = None
    fraction: float | None = None
    bytes: float | None = None
    flops: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "shape": list(self.shape)}


def measure(
    problem: Problem,
    formats: Sequence[str],
    repeats: int,
    *,
    parts: Collection[str] = PARTS,
    warmup: int = 1,
    deadline: float | None = None,
    on_round: Callable[[], None] = lambda: None,
    on_case: Callable[[str], None] = lambda _: None,
) -> list[Result]:
    """A row for each case of some parts of the problem, and for peaks; see `measure_cases`."""
    found = list(make_cases(problem, formats, parts))
    roofs = {FROM_MEMORY, IN_L2} if problem.device.type == "cpu" else {FROM_MEMORY}
    if any(PRESETS[name].spectral for name in formats):
        roofs.add(FP32_PRODUCT)
    if set(parts) - {"quantize", "dequantize"}:
        roofs |= {FP32_PRODUCT, BF16_PRODUCT}
    return measure_cases(
        [*found, *peaks(roofs, problem.device)],
        problem.shape,
        repeats,
        device=problem.device.type,
        warmup=warmup,
        deadline=deadline,
        on_round=on_round,
        on_case=on_case,
    )


def measure_cases(
    cases: Sequence[Case],
    shape: tuple[int, int],
    repeats: int,
    *,
    device: str = "cpu",
    warmup: int = 1,
    deadline: float | None = None,
    on_round: Callable[[], None] = lambda: None,
    on_case: Callable[[str], None] = lambda _: None,
) -> list[Result]:
    """A row for each case at one shape; `deadline` of `time.perf_counter()`: see `interleaved`.

    A case that fails, its gate or anything else, is a row with the reason and is not timed. Roofs
    are cases as well, timed in the same rounds: a fraction is a ratio of medians, and of several
    limits of a call it is the largest. `on_case` is
    called with the key of each case before it is prepared and before each sample.
    """
    prepared: dict[str, Prepared] = {}
    reasons: dict[str, tuple[Status, str]] = {}
    for case in cases:
        on_case(case.key)
        try:
            prepared[case.key] = case.prepare()
        except UnavailableError as error:
            reasons[case.key] = "skipped", _one_line(str(error))
        except Exception as error:  # one case that is broken hides no other
            message = _one_line(f"{type(error).__name__}: {error}")
            reasons[case.key] = "skipped" if case.peer else "error", message
    seconds = interleaved(
        {key: value.call for key, value in prepared.items()},
        repeats,
        warmup,
        deadline=float("inf") if deadline is None else deadline,
        sample_seconds=SAMPLE_SECONDS,
        on_round=on_round,
        on_case=on_case,
    )
    middle = medians(seconds)
    most = {
        key: value.work[key] / middle[key] for key, value in prepared.items() if key in value.work
    }

    def row(case: Case) -> Result:
        status, detail = reasons.get(case.key, ("measured", ""))
        blank = Result(
            case.name,
            shape,
            case.format,
            device,
            case.dtype,
            status,
            detail,
            baseline=case.baseline,
            threads=torch.get_num_threads() if device == "cpu" else None,
            isa=case.isa,
        )
        if case.key in reasons:
            return blank
        return _timed(blank, case, prepared[case.key], seconds[case.key], middle, most)

    return [row(case) for case in cases]


def _one_line(message: str) -> str:
    return textwrap.shorten(message, DETAIL_CHARACTERS, placeholder=" ...")


def _timed(
    blank: Result,
    case: Case,
    prepared: Prepared,
    seconds: list[float],
    middle: dict[str, float],
    most: dict[str, float],
) -> Result:
    """The row with what was measured, beside the medians and the most that the roofs found."""
    rows, columns = blank.shape
    median = middle[case.key]
    passed, stored = prepared.passed, prepared.state_bytes
    work = prepared.work
    shares = {roof: work[roof] / median / most[roof] for roof in work if roof in most}
    roof = max(shares, key=lambda each: shares[each], default=None)
    return replace(
        blank,
        seconds=seconds,
        median=median,
        spread=spread(seconds),
        ratio=median / middle[case.baseline] if case.baseline in middle else None,
        error=None if passed is None else passed.error,
        allowed_error=None if passed is None else passed.allowed,
        state_bytes=stored,
        bits_per_element=None if stored is None else 8 * stored / (rows * columns),
        peak_bytes=prepared.peak_bytes,
        work=None if roof is None else work[roof],
        roof=roof,
        fraction=shares.get(roof or ""),
        bytes=next((work[roof] for roof in work if is_copy(roof)), None),
        flops=next((work[roof] for roof in work if not is_copy(roof)), None),
    )


def share_deadline(end: float | None, left: int) -> float | None:
    """When the next of `left` problems has to be done for all to be done at `end`."""
    if end is None:
        return None
    now = time.perf_counter()
    return now + (end - now) / left
