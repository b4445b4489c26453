"""When a run is "there": the same definition for both sides of benchmarks.versus_trl."""

from __future__ import annotations

import pytest

from benchmarks.curve import WINDOW, Curve


def curve(rewards: list[float]) -> Curve:
    """A step every 2 s from second 100 on."""
    return Curve(100.0, [102.0 + 2.0 * step for step in range(len(rewards))], rewards, startup_s=30.0)


def test_there_is_the_first_step_whose_moving_average_reaches_the_target() -> None:
    found = curve([0.0, 0.9, 0.7, 0.8, 0.8, 0.9])
    assert found.steps_to(0.8) == 5  # (0.9 + 0.7 + 0.8 + 0.8) / 4
    assert found.seconds_to(0.8) == 10.0  # from the first question, start-up not counted
    assert found.step_s == 2.0


def test_a_lucky_start_does_not_count_before_the_window_is_full() -> None:
    assert curve([1.0] * WINDOW).steps_to(0.8) == WINDOW
    assert curve([1.0] * (WINDOW - 1)).steps_to(0.8) is None


@pytest.mark.parametrize("rewards", [[], [0.1] * 20])
def test_never_there(rewards: list[float]) -> None:
    assert curve(rewards).seconds_to(0.8) is None
