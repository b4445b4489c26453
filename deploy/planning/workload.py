"""What a run computes: how long responses are, how many groups carry no gradient, what is evaluated.

Invariant: lengths are between 1 and the budget, and groups are drawn whole, so that responses to one question may
be alike, as recorded ones are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DEFAULT_MEAN_SHARE = 0.2  # of the budget: responses of 600 tokens under 3000, about the paper's Figure 1
DEFAULT_SPREAD = 0.7  # standard deviation of log-lengths


@dataclass(frozen=True)
class LogNormal:
    """Independent lengths, log-normal, cut at the budget; `mean` is the one before the cut, in tokens."""

    mean: float
    longest: int
    spread: float = DEFAULT_SPREAD

    def draw(self, rng: np.random.Generator, size: int) -> list[int]:
        """Lengths of `size` responses to one question, in tokens."""
        centre = math.log(self.mean) - self.spread**2 / 2
        drawn = np.rint(rng.lognormal(centre, self.spread, size))
        return np.clip(drawn, 1, self.longest).astype(int).tolist()

    def __str__(self) -> str:
        return f"log-normal, mean {self.mean:g} tokens (spread {self.spread:g}), cut at {self.longest:,}"


@dataclass(frozen=True)
class Recorded:
    """Groups of lengths as they were seen; a group is drawn whole, and from several where it is too small."""

    groups: Sequence[tuple[int, ...]]
    longest: int

    def draw(self, rng: np.random.Generator, size: int) -> list[int]:
        """Lengths of `size` responses to one question, in tokens."""
        lengths: list[int] = []
        while len(lengths) < size:
            lengths += self.groups[int(rng.integers(len(self.groups)))]
        return [min(length, self.longest) for length in lengths[:size]]

    @property
    def mean(self) -> float:
        """Mean length, in tokens."""
        return float(np.mean([min(n, self.longest) for group in self.groups for n in group]))

    def __str__(self) -> str:
        return f"as recorded: {len(self.groups):,} groups, mean {self.mean:.1f} tokens"


@dataclass(frozen=True)
class Workload:
    """What one run computes beside what its recipe says.

    Attributes:
        lengths: of responses.
        prompt_tokens: of one question, template included.
        filtered_share: of groups whose rewards are all equal, 0..1.
        eval_sequences: greedy and sampled answers of one evaluation.
        questions: training questions; bounds the run by `data.max_epochs`.
    """

    lengths: LogNormal | Recorded
    prompt_tokens: float
    filtered_share: float = 0.0
    eval_sequences: int = 0
    questions: int = 1_000_000
