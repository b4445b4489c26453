"""Countdown: shaped reward 0 / 0.1 / 1, solvable questions, hostile responses."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.tasks.countdown import countdown, reward

QUESTION = {"numbers": [3, 5, 7], "answer": "22"}


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<answer>3*5+7</answer>", 1.0),
        ("<answer> (3 * 5) + 7 = 22 </answer>", 1.0),
        ("\\boxed{7+5*3}", 1.0),
        ("<answer>1</answer> no: <answer>3*5+7</answer>", 1.0),
        ("<answer>3+5+7</answer>", 0.1),
        ("<answer>22</answer>", 0.1),
        ("<answer>3*5+7+0</answer>", 0.1),
        ("<answer>3*5+</answer>", 0.1),
        ("<answer>7/(5-5)*3</answer>", 0.1),
        ("<answer>__import__('os')</answer>", 0.1),
        ("<answer>3**5**7</answer>", 0.1),
        ("<answer></answer>", 0.1),
        ("3*5+7", 0.0),
        ("", 0.0),
    ],
)
def test_reward(response: str, expected: float) -> None:
    assert reward(response, QUESTION) == expected


@given(st.text())
def test_no_response_crashes_the_reward(text: str) -> None:
    assert reward(text, QUESTION) == 0.0 or "<answer>" in text or "boxed" in text
    assert reward(f"<answer>{text}</answer>", QUESTION) in (0.1, 1.0)


@given(st.text(alphabet="0123456789+-*/() ", max_size=300))
def test_arithmetic_like_responses_do_not_crash(text: str) -> None:
    assert reward(f"<answer>{text}</answer>", QUESTION) in (0.1, 1.0)


def test_every_question_can_be_solved() -> None:
    for row in countdown(60, seed=4):
        a, b, c = row["numbers"]
        solved = any(
            reward(f"<answer>({x}{p}{y}){q}{z}</answer>", row) == 1.0
            for x, y, z in itertools.permutations((a, b, c))
            for p, q in itertools.product("+-*", repeat=2)
        )
        assert solved, row


def test_questions_depend_on_the_seed_alone() -> None:
    assert countdown(20, seed=1) == countdown(20, seed=1)
    assert countdown(20, seed=1) != countdown(20, seed=2)
    assert len({row["uid"] for row in countdown(50)}) == 50
