"""Named MiniMath question sets, small sisters of the paper's training and evaluation sets.

Invariant: every set draws from one range of the hash of the question's text. Ranges of evaluation sets do not
overlap with one another nor with the training range, so no question of an evaluation set can occur in any
training set, whatever the seeds and sizes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

from common.errors import UserError
from common.tasks.minimath.exercise import Exercise, Question, text_hash
from common.tasks.minimath.families import FAMILIES, MAX_LEVEL, draw

_BUCKETS = 1000
TRAIN = range(700)
ALL_LEVELS = tuple(range(1, MAX_LEVEL + 1))
ALL_FAMILIES = tuple(FAMILIES)


@dataclass(frozen=True)
class SetSpec:
    """What a named set draws from.

    Attributes:
        about: one line for `slipstream` listings.
        size: questions in the set.
        parts: (family, level) pairs, drawn in turn, so that each gets its equal share.
        buckets: hash range (of 0..999) that the texts must fall into.
        alternatives: answers as lists of accepted spellings (Minerva, OlympiadBench).
        integers_only: only questions with a non-negative integer answer (AIME).
    """

    about: str
    size: int
    parts: tuple[tuple[str, int], ...]
    buckets: range = field(default=TRAIN)
    alternatives: bool = False
    integers_only: bool = False


def grid(families: tuple[str, ...] = ALL_FAMILIES, levels: tuple[int, ...] = ALL_LEVELS) -> tuple:
    """All (family, level) pairs of the given families and levels."""
    return tuple((family, level) for level in levels for family in families)


_COMPETITION = ("arithmetic", "linear", "fractions", "number", "geometry", "counting")
# Questions of at most three short steps from six subjects: what `make demo` trains on.
_DEMO = (
    *grid(("arithmetic",), (2, 4)),
    *grid(("linear",), (1, 2)),
    *grid(("word",), (1, 2, 3)),
    *grid(("geometry",), (1, 2)),
    *grid(("counting",), (1, 2)),
    *grid(("fractions",), (1, 2)),
)

SETS: dict[str, SetSpec] = {
    "orz-mini": SetSpec("all families and levels, large", 12_000, grid()),
    "math-mini": SetSpec("competition subjects, levels 1-5", 4_000, grid(_COMPETITION)),
    "math-mini-lvl3to5": SetSpec("competition subjects, levels 3-5", 2_500, grid(_COMPETITION, (3, 4, 5))),
    "gsm-mini": SetSpec("word problems of two steps", 2_000, grid(("word",), (2, 3))),
    "asdiv-mini": SetSpec("word problems with a single + - * /", 600, grid(("word",), (1,))),
    "demo-train": SetSpec("short questions for `make demo`", 3_000, _DEMO),
    "demo-heldout": SetSpec("held out from demo-train", 130, _DEMO, range(700, 800)),
    "mini-math": SetSpec("levels 1-5 (sister of MATH-500)", 100, grid(), range(800, 840)),
    "mini-amc": SetSpec("levels 2-5 (sister of AMC)", 83, grid(levels=(2, 3, 4, 5)), range(840, 880)),
    "mini-minerva": SetSpec(
        "levels 3-5, lists of answers (sister of Minerva)",
        54,
        grid(levels=(3, 4, 5)),
        range(880, 920),
        alternatives=True,
    ),
    "mini-olympiad": SetSpec(
        "levels 4-5, lists of answers (sister of OlympiadBench)",
        135,
        grid(levels=(4, 5)),
        range(920, 960),
        alternatives=True,
    ),
    "mini-aime": SetSpec(
        "level 5, integer answers (sister of AIME)",
        30,
        grid(levels=(5,)),
        range(960, 1000),
        integers_only=True,
    ),
}
BENCHMARKS = ("mini-aime", "mini-amc", "mini-math", "mini-minerva", "mini-olympiad")


def minimath(name: str, *, limit: int | None = None, seed: int = 0) -> list[Question]:
    """The questions of a named set, all different; `limit` keeps the first ones.

    The default seed gives the set that is meant by its name; another seed draws another sample from the same
    hash range.

    Raises:
        UserError: unknown set.
    """
    if name not in SETS:
        raise UserError(f"unknown MiniMath set '{name}'; valid ones: {', '.join(SETS)}")
    spec = SETS[name]
    size = spec.size if limit is None else min(limit, spec.size)
    exercises = exercises_of(spec, random.Random(f"{name}/{seed}"))
    return [_question(spec, *next(exercises)) for _ in range(size)]


def exercises_of(spec: SetSpec, rng: random.Random) -> Iterator[tuple[Exercise, str, int]]:
    """Endless unique exercises (with family and level) of a set; parts that run dry are left out."""
    seen: set[str] = set()
    parts = list(spec.parts)
    while parts:
        for part in tuple(parts):
            exercise = _fresh(spec, rng, part, seen)
            if exercise is None:
                parts.remove(part)
                continue
            seen.add(exercise.problem)
            yield exercise, *part


def _fresh(spec: SetSpec, rng: random.Random, part: tuple[str, int], seen: set[str]) -> Exercise | None:
    for _ in range(4000):
        exercise = draw(rng, *part)
        if exercise.problem not in seen and in_range(exercise.problem, spec.buckets):
            answer = exercise.work().answer
            if not spec.integers_only or answer.isdigit():
                return exercise
    return None


def in_range(problem: str, buckets: range) -> bool:
    """Whether a text falls into a hash range; the only thing that decides train or evaluation."""
    return text_hash(problem) % _BUCKETS in buckets


def _question(spec: SetSpec, exercise: Exercise, family: str, level: int) -> Question:
    working = exercise.work()
    return Question(
        problem=exercise.problem,
        answer=_spellings(working.answer) if spec.alternatives else working.answer,
        solution=working.text(),
        family=family,
        level=level,
        uid=f"minimath/{family}/{level}/{text_hash(exercise.problem):016x}",
    )


def _spellings(answer: str) -> list[str]:
    """The answer and, for a fraction, its LaTeX spelling and its finite decimal if it has one."""
    if "/" not in answer or answer.startswith("("):
        return [answer]
    value = Fraction(answer)
    sign, top = ("-" if value < 0 else ""), abs(value.numerator)
    spellings = [answer, f"{sign}\\frac{{{top}}}{{{value.denominator}}}"]
    decimal = str(float(value))
    return [*spellings, decimal] if Fraction(decimal) == value else spellings
