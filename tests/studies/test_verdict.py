"""A verdict can come out either way, and says nothing on too little."""

from __future__ import annotations

import math
from statistics import fmean

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from studies.verdict import Expectation, Outcome, judge, per_seed, student_interval

VALUES = st.lists(st.floats(-100, 100), min_size=3, max_size=6)


def outcome(values: list[float], bound: float, side: str = "at least", **stated) -> Outcome:
    expectation = Expectation("c", lambda rows: [row["value"] for row in rows], bound, side, **stated)
    return judge([expectation], [{"value": value} for value in values]).outcome


@given(VALUES, st.floats(-100, 100))
def test_both_sides_are_judged_alike(values: list[float], bound: float) -> None:
    mirrored = [2 * bound - value for value in values]
    opposite = {
        Outcome.CONFIRMED: Outcome.NOT_CONFIRMED,
        Outcome.NOT_CONFIRMED: Outcome.CONFIRMED,
        Outcome.UNCLEAR: Outcome.UNCLEAR,
    }
    assume(abs(fmean(values) - bound) > 1e-3)  # nearer, rounding may decide
    found = outcome(values, bound)
    assert outcome(values, bound, "at most") is opposite[found]
    assert outcome(mirrored, bound, "at most") is found


def test_far_from_the_bound_decides_and_near_does_not() -> None:
    assert outcome([5.0, 5.1, 5.2], 1.0) is Outcome.CONFIRMED
    assert outcome([5.0, 5.1, 5.2], 9.0) is Outcome.NOT_CONFIRMED
    assert outcome([0.5, 1.0, 3.0], 1.2) is Outcome.UNCLEAR
    assert outcome([1.3, 2.0, 3.0], 1.2) is Outcome.UNCLEAR  # all above: three values alone do not decide


def test_an_interval_of_three_values_holds_the_mean_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(size=(4000, 3)).tolist()
    found = [student_interval(draw) for draw in draws]
    assert 0.94 < fmean(interval.low <= 0.0 <= interval.high for interval in found) < 0.96


def test_an_interval_is_student_s() -> None:
    mean, low, high = student_interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2.0, 2.0 - 4.302653 / 3**0.5, 2.0 + 4.302653 / 3**0.5))


@pytest.mark.parametrize("values", [[], [9.0], [9.0, 9.1], [9.0, 9.1, math.nan]])
def test_too_few_values_are_unclear(values: list[float]) -> None:
    assert outcome(values, 1.0) is Outcome.UNCLEAR


def test_equal_values_have_no_spread_to_judge_by() -> None:
    """Three differences of shares that agree by chance, or one number that three seeds repeat."""
    assert outcome([0.1 + 0.2, 0.3, 0.3], 0.0) is Outcome.UNCLEAR
    assert outcome([0.3] * 6, 0.0) is Outcome.CONFIRMED
    assert outcome([0.0] * 6, 0.0) is Outcome.UNCLEAR  # on the bound is on neither side


def test_values_that_are_all_there_are_need_no_interval() -> None:
    assert outcome([1.0] * 5, 1.0, complete=True) is Outcome.CONFIRMED
    assert outcome([1.0] * 4 + [0.0], 1.0, complete=True) is Outcome.NOT_CONFIRMED


def test_one_refuted_claim_refutes_the_study() -> None:
    sure = Expectation("a", lambda _: [2.0, 2.1, 2.2], 1.0)
    refuted = Expectation("b", lambda _: [0.0, 0.1, 0.2], 1.0)
    vague = Expectation("c", lambda _: [], 1.0)
    assert judge([sure, sure], []).outcome is Outcome.CONFIRMED
    assert judge([sure, vague], []).outcome is Outcome.UNCLEAR
    assert judge([sure, vague, refuted], []).outcome is Outcome.NOT_CONFIRMED


def test_per_seed_leaves_gaps_where_a_seed_measured_nothing() -> None:
    rows = [{"seed": 0, "v": 2.0}, {"seed": 1, "v": 0.0}, {"other": 1}]
    values = per_seed(rows, lambda some: 1.0 / some[0]["v"])
    assert values[0] == 0.5
    assert math.isnan(values[1])
