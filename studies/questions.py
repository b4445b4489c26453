"""The miniature's question sets: four to train on, one to measure, all from the parts that the zoo has seen.

Invariant: training and held-out questions come from disjoint ranges of the hash of their text, as in MiniMath's
named sets, so that no held-out question was ever trained on.
"""

from __future__ import annotations

import random

from common.tasks.minimath import TRAIN, Question, SetSpec, exercises_of
from common.tasks.minimath.exercise import text_hash

_ARITHMETIC = (("arithmetic", 1), ("arithmetic", 2))
_WORD = (("word", 1), ("word", 2))
# Miniature of table 3: from broad to narrow.
PARTS = {
    "orz": (*_ARITHMETIC, *_WORD),
    "math": _ARITHMETIC,
    "gsm8k": (("word", 2),),
    "asdiv": (("word", 1),),
}
HELD_OUT = range(700, 800)


def training_set(name: str, size: int, seed: int = 0) -> list[Question]:
    """Questions of one of the four sets."""
    return _draw(SetSpec(name, size, PARTS[name], TRAIN), f"{name}/{seed}")


def held_out(size: int) -> list[Question]:
    """Questions of all parts, the same in every study."""
    return _draw(SetSpec("held-out", size, PARTS["orz"], HELD_OUT), "held-out")


def _draw(spec: SetSpec, seed: str) -> list[Question]:
    exercises = exercises_of(spec, random.Random(seed))
    return [_question(*next(exercises)) for _ in range(spec.size)]


def _question(exercise, family: str, level: int) -> Question:
    working = exercise.work()
    uid = f"{family}/{level}/{text_hash(exercise.problem):016x}"
    return Question(exercise.problem, working.answer, working.text(), family, level, uid)
