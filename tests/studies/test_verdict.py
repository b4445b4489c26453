"""A verdict can come out either way, and says nothing on too little."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studies.verdict import Expectation, Outcome, judge, per_seed

VALUES = st.lists(st.floats(-100, 100), min_size=3, max_size=6)


def outcome(values: list[float], bound: float, side: str = "at least") -> Outcome:
    expectation = Expectation("c", lambda rows: [row["value"] for row in rows], bound, side)
    return judge([expectation], [{"value": value} for value in values]).outcome


@given(VALUES, st.floats(-100, 100))
def test_all_values_on_one_side_decide(values: list[float], bound: float) -> None:
    above = [bound + 1 + abs(value) for value in values]
    below = [bound - 1 - abs(value) for value in values]
    assert outcome(above, bound) is Outcome.CONFIRMED
    assert outcome(below, bound) is Outcome.NOT_CONFIRMED
    assert outcome(below, bound, "at most") is Outcome.CONFIRMED
    assert outcome(above, bound, "at most") is Outcome.NOT_CONFIRMED


def test_values_on_both_sides_are_unclear() -> None:
    assert outcome([0.5, 1.0, 3.0], 1.2) is Outcome.UNCLEAR


@pytest.mark.parametrize("values", [[], [9.0], [9.0, 9.0], [9.0, 9.0, math.nan]])
def test_too_few_values_are_unclear(values: list[float]) -> None:
    assert outcome(values, 1.0) is Outcome.UNCLEAR


def test_one_refuted_claim_refutes_the_study() -> None:
    sure = Expectation("a", lambda _: [2.0] * 3, 1.0)
    refuted = Expectation("b", lambda _: [0.0] * 3, 1.0)
    vague = Expectation("c", lambda _: [], 1.0)
    assert judge([sure, sure], []).outcome is Outcome.CONFIRMED
    assert judge([sure, vague], []).outcome is Outcome.UNCLEAR
    assert judge([sure, vague, refuted], []).outcome is Outcome.NOT_CONFIRMED


def test_per_seed_leaves_gaps_where_a_seed_measured_nothing() -> None:
    rows = [{"seed": 0, "v": 2.0}, {"seed": 1, "v": 0.0}, {"other": 1}]
    values = per_seed(rows, lambda some: 1.0 / some[0]["v"])
    assert values[0] == 0.5
    assert math.isnan(values[1])
