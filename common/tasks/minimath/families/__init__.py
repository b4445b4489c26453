"""The families (subjects) of MiniMath: each a module with five `level` functions, easy to hard.

Invariant: a level function is a pure function of its random generator.
"""

from __future__ import annotations

import random

from common.tasks.minimath.exercise import Exercise
from common.tasks.minimath.families import (
    arithmetic,
    counting,
    fractions,
    geometry,
    linear,
    number,
    word,
)

FAMILIES = {
    "arithmetic": arithmetic.LEVELS,
    "linear": linear.LEVELS,
    "fractions": fractions.LEVELS,
    "number": number.LEVELS,
    "word": word.LEVELS,
    "geometry": geometry.LEVELS,
    "counting": counting.LEVELS,
}
MAX_LEVEL = 5


def draw(rng: random.Random, family: str, level: int) -> Exercise:
    """Draws one exercise of a family at a level 1 to 5."""
    return FAMILIES[family][level - 1](rng)
