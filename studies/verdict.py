"""What a study expected, and what its rows say about it.

Invariant: an expectation is data (a claim, a measure, a bound) that exists before any row does, and its outcome
follows from the rows alone. `confirmed` and `not confirmed` are symmetric: the confidence interval lies wholly on
one side of the bound; anything else, too few repetitions included, is `unclear`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from common.evaluation import Interval, bootstrap

Row = Mapping[str, Any]
Measure = Callable[[Sequence[Row]], Sequence[float]]

MIN_REPETITIONS = 3  # below this an interval says nothing
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
        unit: what is repeated, and therefore resampled.
    """

    claim: str
    measure: Measure
    bound: float
    side: Literal["at least", "at most"] = "at least"
    unit: str = "seeds"


@dataclass(frozen=True)
class Finding:
    """An expectation with its outcome; `interval` is None where nothing could be measured."""

    expectation: Expectation
    interval: Interval | None
    repetitions: int
    outcome: Outcome

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        stated = self.expectation
        return {
            "claim": stated.claim,
            "expected": f"{stated.side} {stated.bound:g}",
            "interval": None if self.interval is None else self.interval._asdict(),
            "repetitions": self.repetitions,
            "unit": stated.unit,
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
        return Finding(expectation, None, 0, Outcome.UNCLEAR)
    interval = bootstrap(values, confidence=CONFIDENCE)
    return Finding(expectation, interval, len(values), _outcome(expectation, interval, len(values)))


def _outcome(expectation: Expectation, interval: Interval, repetitions: int) -> Outcome:
    if repetitions < MIN_REPETITIONS:
        return Outcome.UNCLEAR
    above = expectation.side == "at least"
    if (interval.low >= expectation.bound) if above else (interval.high <= expectation.bound):
        return Outcome.CONFIRMED
    if (interval.high < expectation.bound) if above else (interval.low > expectation.bound):
        return Outcome.NOT_CONFIRMED
    return Outcome.UNCLEAR


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
