"""The learning rate over optimizer steps: pure functions of the step number."""

from __future__ import annotations

import math
from collections.abc import Callable


def lr_factor(schedule: str, warmup: int, total: int) -> Callable[[int], float]:
    """Factor on the recipe's learning rate at optimizer step 0, 1, ...

    Args:
        schedule: `constant`, or `cosine` (half a cosine from 1 to 0 between warm-up and `total`).
        warmup: optimizer steps of linear warm-up; the first uses 1/(warmup + 1) of the rate, never 0.
        total: optimizer steps of the whole run.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if schedule == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor
