"""MiniMath: an embedded world of short maths questions with worked solutions and gold answers.

Families (subjects) by levels 1 to 5, generated from a seed; no file, no network, no torch.
"""

from common.tasks.minimath.exercise import Exercise, Question, Working
from common.tasks.minimath.families import FAMILIES, MAX_LEVEL, draw
from common.tasks.minimath.sets import (
    ALL_FAMILIES,
    ALL_LEVELS,
    BENCHMARKS,
    SETS,
    TRAIN,
    SetSpec,
    exercises_of,
    grid,
    in_range,
    minimath,
)

__all__ = [
    "ALL_FAMILIES",
    "ALL_LEVELS",
    "BENCHMARKS",
    "FAMILIES",
    "MAX_LEVEL",
    "SETS",
    "TRAIN",
    "Exercise",
    "Question",
    "SetSpec",
    "Working",
    "draw",
    "exercises_of",
    "grid",
    "in_range",
    "minimath",
]
