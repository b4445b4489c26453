"""What both sides report, and the one definition of "there".

Invariant: a point is written when its step has been trained on, and its reward is the mean over every response
that was sampled for the step; no side's start-up is counted: a curve begins when the first question is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

WINDOW = 4  # steps of the moving average


@dataclass(frozen=True)
class Curve:
    """One run.

    Attributes:
        started: seconds (clock of `time.time`) at which the first question was asked.
        ended: of each step, when it had been trained on.
        rewards: of each step, the mean over all its responses, 0..1.
        startup_s: from the command to `started`.
    """

    started: float
    ended: Sequence[float]
    rewards: Sequence[float]
    startup_s: float

    def steps_to(self, target: float) -> int | None:
        """Steps until the moving average of the reward reaches `target`; None if it never does."""
        for step in range(WINDOW, len(self.rewards) + 1):
            if sum(self.rewards[step - WINDOW : step]) / WINDOW >= target:
                return step
        return None

    def seconds_to(self, target: float) -> float | None:
        """Seconds from the first question until then."""
        step = self.steps_to(target)
        return None if step is None else self.ended[step - 1] - self.started

    @property
    def step_s(self) -> float:
        """Median seconds per step, the first one left out."""
        gaps = sorted(later - earlier for earlier, later in pairwise(self.ended))
        return gaps[len(gaps) // 2] if gaps else float("nan")
