"""What stands out among diagnoses, in sentences, by thresholds that are derived, not chosen."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from lowbit_muon.formats.presets import PRESETS
from lowbit_muon.state.diagnosis import Diagnosis

# Modified z-score above which a value is an outlier, and what turns a median of absolute
# deviations into the standard deviation of a normal distribution: B. Iglewicz and D. Hoaglin,
# How to Detect and Handle Outliers, ASQC 1993.
OUTLIER_SCORE = 3.5
MAD_TO_DEVIATION = 1.4826
# How probable it may be that some matrix of a table of normal entries has a finding.
FALSE_FINDING = 0.05
NAMED = 3  # matrices in a sentence; the table has the others


def findings(rows: Sequence[Diagnosis]) -> list[str]:
    """One sentence for each thing that stands out; none if nothing does."""
    return [
        sentence
        for find in (_large_errors, _useless_updates, _skipped, _fewer_steps, _clipped, _zeros)
        for sentence in find(rows)
    ]


def _large_errors(rows: Sequence[Diagnosis]) -> Iterator[str]:
    """Against the median of the same format, in units of the spread between matrices."""
    by_format: dict[str, list[Diagnosis]] = defaultdict(list)
    for row in rows:
        if row.direction_error is not None:
            by_format[row.state_format].append(row)
    for name, members in by_format.items():
        errors = [_error(row) for row in members]
        median = statistics.median(errors)
        spread = MAD_TO_DEVIATION * statistics.median(abs(error - median) for error in errors)
        outliers = [
            row
            for row in members
            if _error(row) - median > OUTLIER_SCORE * max(spread, _sampling(median, row))
        ]
        if outliers:
            yield (
                f"Direction error far above {name}'s median of {median:.3f} (more than "
                f"{OUTLIER_SCORE} robust standard deviations) in "
                f"{_named(outliers, _error, '{:.3f}')}; muon_param_groups(overrides=...) gives a "
                "matrix more bits."
            )


def _error(row: Diagnosis) -> float:
    assert row.direction_error is not None
    return row.direction_error


def _sampling(median: float, row: Diagnosis) -> float:
    """Standard deviation of the norm of mn independent errors, by chance alone.

    The norm of k normal numbers varies by 1 / sqrt(2k) of itself.
    """
    return median / math.sqrt(2 * max(1, row.shape[0] * row.shape[1]))


def _useless_updates(rows: Sequence[Diagnosis]) -> Iterator[str]:
    """An update of zeros has a relative error of one."""
    found = [row for row in rows if row.direction_error is not None and row.direction_error >= 1]
    if found:
        yield (
            "Direction error of one or more, as if there were no update at all, in "
            f"{_named(found, _error, '{:.3f}')}."
        )


def _skipped(rows: Sequence[Diagnosis]) -> Iterator[str]:
    found = [row for row in rows if row.skipped]
    if found:
        yield (
            "Gradients with inf or nan were skipped, as often as in brackets, in "
            f"{_named(found, lambda row: row.skipped, '{:.0f}')}."
        )


def _fewer_steps(rows: Sequence[Diagnosis]) -> Iterator[str]:
    most = max((row.steps + row.skipped for row in rows), default=0)
    found = [row for row in rows if row.steps + row.skipped < most]
    if found:
        yield (
            f"No gradient came in as many of {most} steps as in brackets to "
            f"{_named(found, lambda row: most - row.steps - row.skipped, '{:.0f}')}."
        )


def _clipped(rows: Sequence[Diagnosis]) -> Iterator[str]:
    """Formats with a scale from the RMS clip on purpose, as their codebook wants it of a Gaussian.

    More than chance and more than a Gaussian has in the *two* outermost levels of each side: the
    codebook is a level short then. Scales from the largest value clip nothing.
    """
    found = []
    for row in rows:
        shares = gaussian_end_shares(row.state_format)
        if row.end_codes is None or shares is None:
            continue
        expected, one_level_more = shares
        elements = row.shape[0] * row.shape[1]
        # Chernoff: the chance of a share this high is at most exp(-elements * divergence).
        chance = math.exp(-elements * _divergence(row.end_codes, expected))
        if row.end_codes > one_level_more and chance < FALSE_FINDING / len(rows):
            found.append(row)
    if found:
        worst = max(found, key=_end_share)
        shares = gaussian_end_shares(worst.state_format)
        assert shares is not None
        yield (
            "More codes at the ends of the codebook than normal entries would have "
            f"({shares[0]:.2%} in {worst.state_format}): large entries are clipped, in "
            f"{_named(found, _end_share, '{:.2%}')}."
        )


def _end_share(row: Diagnosis) -> float:
    return row.end_codes or 0.0


def gaussian_end_shares(state_format: str) -> tuple[float, float] | None:
    """Shares of a Gaussian in the outermost level of each side and in the two outermost.

    None for what is not a preset, is not coded, or takes its scale from the largest value.
    """
    preset = PRESETS.get(state_format)
    if preset is None or preset.is_dense or preset.statistic != "rms":
        return None
    book = preset.code_book()
    unit = preset.clip / max(map(abs, book.levels))  # of the levels, for entries of RMS one

    def share(low: float, high: float) -> float:
        return (math.erfc(-low * unit / math.sqrt(2)) + math.erfc(high * unit / math.sqrt(2))) / 2

    below = book.thresholds
    return share(below[0], below[-1]), share(below[1], below[-2])


def _divergence(found: float, expected: float) -> float:
    """Of two coins (Kullback and Leibler); 0 where no more was found than expected."""
    if found <= expected:
        return 0.0
    rest = (1 - found) * math.log((1 - found) / (1 - expected)) if found < 1 else 0.0
    return found * math.log(found / expected) + rest


def _zeros(rows: Sequence[Diagnosis]) -> Iterator[str]:
    found = [row for row in rows if row.direction_error is None]
    if found:
        yield (
            "The momentum is zero, as if all gradients had been (steps in brackets), in "
            f"{_named(found, lambda row: row.steps, '{:.0f}')}."
        )


def _named(rows: Sequence[Diagnosis], value: Callable[[Diagnosis], float], spec: str) -> str:
    """The rows of the largest values, with them."""
    worst = sorted(rows, key=value, reverse=True)
    names = [f"{row.name} ({spec.format(value(row))})" for row in worst[:NAMED]]
    more = [f"{len(rows) - NAMED} more"] if len(rows) > NAMED else []
    parts = names + more
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"{matrices(len(rows))}: {listed}"


def matrices(count: int) -> str:
    """So many, in words."""
    return f"{count} {'matrix' if count == 1 else 'matrices'}"
