"""What a study expected, and what its rows say about it.

Invariant: an expectation is data (a claim, a measure, a bound) that exists before any row does, and its outcome
follows from the rows alone. `confirmed` and `not confirmed` are symmetric: the confidence interval lies wholly on
one side of the bound; anything else, too few repetitions included, is `unclear`. What counts as a repetition is
independent of the others: a number that is the same by construction is given once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from common.evaluation import Interval

Row = Mapping[str, Any]
Measure = Callable[[Sequence[Row]], Sequence[float]]

MIN_REPETITIONS = 3  # below this an interval says nothing
# Equal values have no spread to estimate an interval from; only without assumptions, the range of n values holds
# their median with probability 1 - 2^(1-n): at least 95 % from six on.
MIN_EQUAL_REPETITIONS = 6
CONFIDENCE = 0.95


class Outcome(StrEnum):
    """What the data say about a claim."""

    CONFIRMED = "confirmed"
    NOT_CONFIRMED = "not confirmed"
    UNCLEAR = "unclear"


@dataclass(frozen=True)
class Expectation:
    """A claim with a number, stated before the run.

    Attributes:
        claim: in words, without the number.
        measure: rows to one value per independent repetition; values that are not finite are left out.
        bound: what the mean of the values is compared with.
        side: whether the claim says `at least` or `at most` the bound.
        unit: what is repeated.
        complete: the values are all there are (five named frameworks), no sample: compared without an interval.
        full: rows of a full-size run can measure it.
    """

    claim: str
    measure: Measure
    bound: float
    side: Literal["at least", "at most"] = "at least"
    unit: str = "seeds"
    complete: bool = False
    full: bool = True


@dataclass(frozen=True)
class Finding:
    """An expectation with its outcome.

    Attributes:
        expectation: what was stated.
        mean: of the values, None where nothing could be measured.
        interval: of the mean, None where the values allow none.
        repetitions: how many values.
        outcome: of the comparison.
    """

    expectation: Expectation
    mean: float | None
    interval: Interval | None
    repetitions: int
    outcome: Outcome

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        stated = self.expectation
        return {
            "claim": stated.claim,
            "expected": f"{stated.side} {stated.bound:g}",
            "mean": self.mean,
            "interval": None if self.interval is None else [self.interval.low, self.interval.high],
            "repetitions": self.repetitions,
            "unit": f"{stated.unit}, all there are" if stated.complete else stated.unit,
            "outcome": str(self.outcome),
        }


@dataclass(frozen=True)
class Verdict:
    """All findings of a study."""

    findings: tuple[Finding, ...]

    @property
    def outcome(self) -> Outcome:
        """Confirmed if every claim is, not confirmed if any is refuted, else unclear."""
        outcomes = {finding.outcome for finding in self.findings}
        if Outcome.NOT_CONFIRMED in outcomes:
            return Outcome.NOT_CONFIRMED
        return Outcome.CONFIRMED if outcomes == {Outcome.CONFIRMED} else Outcome.UNCLEAR


def judge(expectations: Sequence[Expectation], rows: Sequence[Row]) -> Verdict:
    """Compare each expectation with the rows."""
    return Verdict(tuple(_finding(expectation, rows) for expectation in expectations))


def _finding(expectation: Expectation, rows: Sequence[Row]) -> Finding:
    values = [value for value in expectation.measure(rows) if math.isfinite(value)]
    if not values:
        return Finding(expectation, None, None, 0, Outcome.UNCLEAR)
    average = sum(values) / len(values)
    interval = None if expectation.complete else student_interval(values)
    return Finding(expectation, average, interval, len(values), _outcome(expectation, average, interval))


def student_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """Mean of independent values with Student's t interval, or None where they do not allow one.

    The percentile bootstrap of three values is their range, which holds the mean in 75 % of cases, not in 95 %.

    Args:
        values: one per independent repetition.
        confidence: of the interval, 0..1.
    """
    from scipy.special import stdtrit

    count, average = len(values), math.fsum(values) / max(1, len(values))
    # Equal up to the rounding of the differences and ratios that they are.
    equal = count > 0 and max(values) - min(values) <= 1e-9 * max(1.0, abs(average))
    if count < (MIN_EQUAL_REPETITIONS if equal else MIN_REPETITIONS):
        return None
    deviation = 0.0 if equal else math.sqrt(math.fsum((v - average) ** 2 for v in values) / (count - 1))
    half = float(stdtrit(count - 1, (1 + confidence) / 2)) * deviation / math.sqrt(count)
    return Interval(average, average - half, average + half)


def _outcome(expectation: Expectation, average: float, interval: Interval | None) -> Outcome:
    above, bound = expectation.side == "at least", expectation.bound
    if expectation.complete:
        holds = average >= bound if above else average <= bound
        return Outcome.CONFIRMED if holds else Outcome.NOT_CONFIRMED
    if interval is None or interval.low <= bound <= interval.high:
        return Outcome.UNCLEAR
    return Outcome.CONFIRMED if (interval.low > bound) == above else Outcome.NOT_CONFIRMED


def per_seed(rows: Sequence[Row], value: Callable[[Sequence[Row]], float]) -> list[float]:
    """`value` of each seed's rows, in order of seeds; nan where the seed's rows do not allow it."""
    seeds = sorted({row["seed"] for row in rows if "seed" in row})
    values = []
    for seed in seeds:
        try:
            values.append(value([row for row in rows if row.get("seed") == seed]))
        except (ValueError, ZeroDivisionError):  # an unfinished seed has nothing to average
            values.append(math.nan)
    return values


def mean(values: Sequence[float | None]) -> float:
    """Arithmetic mean of what was measured; ValueError if nothing was."""
    measured = [value for value in values if value is not None]
    if not measured:
        raise ValueError("nothing was measured")
    return sum(measured) / len(measured)
