"""MiniMath: gold answers against independent calculation, disjoint sets, faithful misconceptions."""

from __future__ import annotations

import ast
import itertools
import math
import random
import re
import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from common.tasks.minimath import BENCHMARKS, FAMILIES, SETS, TRAIN, draw, in_range, minimath
from common.tasks.minimath.exercise import Scratchpad

CELLS = [(family, level) for family in FAMILIES for level in range(1, 6)]


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _exact(expression: str) -> Fraction:
    """Exact value of an expression of integers, by walking Python's own parse of it."""

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        if isinstance(node, ast.UnaryOp):
            assert isinstance(node.op, ast.USub)
            return -value(node.operand)
        assert isinstance(node, ast.BinOp)
        a, b = value(node.left), value(node.right)
        return {ast.Add: a.__add__, ast.Sub: a.__sub__, ast.Mult: a.__mul__, ast.Div: a.__truediv__}[
            type(node.op)
        ](b)

    return value(ast.parse(expression, mode="eval").body)


def _arithmetic(text: str) -> Fraction:
    return _exact(text.removesuffix("=?"))


def _linear(text: str) -> Fraction | tuple:
    equations = text.split(", ")
    if text.startswith("x+y"):
        total, gap = _numbers(text)
        return next((x, total - x) for x in range(total + 1) if 2 * x - total == gap)
    left, right = (re.sub(r"(\d)([x(])", r"\1*\2", side) for side in equations[0].split("="))
    return next(
        Fraction(x)
        for x in range(100)
        if _exact(left.replace("x", str(x))) == _exact(right.replace("x", str(x)))
    )


def _fractions(text: str) -> Fraction:
    return _exact(text.removesuffix("=?").replace(" of ", "*"))


def _number(text: str) -> int:
    a, b, *rest = _numbers(text)
    if rest:
        return pow(a, b, rest[0])
    by_word = {"mod": a % b, "gcd": math.gcd(a, b), "lcm": math.lcm(a, b), "last": a**b % 10}
    return next(value for word, value in by_word.items() if word in text)


def _word(text: str) -> Fraction:
    n = _numbers(text)
    if text.startswith("Tank"):
        return Fraction(n[0], n[1] + n[2] if text.count("in") == 2 else n[1] - n[2])
    if "cost" in text:
        return Fraction(n[1] * n[2], n[0])
    if " km in " in text:
        return Fraction(n[2] * n[1], n[0])
    if "Each?" in text:
        return Fraction(n[0], n[1])
    if "All?" in text:
        return Fraction(n[0] * n[1])
    have = n[0] * n[1] if " boxes of " in text else n[0]
    return Fraction(have + n[-1] if "gets" in text else have - n[-1])


def _geometry(text: str) -> Fraction | tuple:
    n = _numbers(text)
    if text.startswith("Midpoint"):
        return Fraction(n[0] + n[2], 2), Fraction(n[1] + n[3], 2)
    if text.startswith("Frame"):
        cells = itertools.product(range(n[0]), range(n[1]))
        return Fraction(sum(x in (0, n[0] - 1) or y in (0, n[1] - 1) for x, y in cells))
    if text.startswith("Trapezoid"):
        return Fraction((n[0] + n[1]) * n[2], 2)
    if text.startswith("Triangle"):
        return Fraction(n[0] * n[1], 2)
    if "perimeter" in text:
        return Fraction((n[0] // 2 - n[1]) * n[1])
    return Fraction(n[0] * n[1] if "Area" in text else 2 * (n[0] + n[1]))


def _counting(text: str) -> int:
    n = _numbers(text)
    if text.startswith("Choose"):
        _, men, _, women = n
        return len(list(itertools.combinations(range(men), 2))) * women
    if text.startswith("Up to"):
        return sum(k % n[1] == 0 or k % n[2] == 0 for k in range(1, n[0] + 1))
    if "integers" in text:
        return len(range(n[0], n[1] + 1))
    if "Outfits" in text:
        return len(list(itertools.product(range(n[0]), range(n[1]))))
    return len(list(itertools.combinations(range(n[-1]), 2)))


INDEPENDENT = {
    "arithmetic": _arithmetic,
    "linear": _linear,
    "fractions": _fractions,
    "number": _number,
    "word": _word,
    "geometry": _geometry,
    "counting": _counting,
}


def _spelled(value: Fraction | int | tuple) -> str:
    return "(" + ", ".join(map(str, value)) + ")" if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize(("family", "level"), CELLS)
def test_gold_answers_match_an_independent_calculation(family: str, level: int) -> None:
    rng = random.Random(f"{family}{level}")
    for _ in range(150):
        exercise = draw(rng, family, level)
        assert exercise.work().answer == _spelled(INDEPENDENT[family](exercise.problem)), exercise.problem


@pytest.mark.parametrize(("family", "level"), CELLS)
def test_every_line_of_every_method_is_true(family: str, level: int) -> None:
    """Misconceptions are carried out faithfully: the wrong method, never wrong arithmetic."""
    rng = random.Random(f"lines/{family}{level}")
    for _ in range(60):
        exercise = draw(rng, family, level)
        for method in ("right", *exercise.misconceptions):
            for line in exercise.work(method).lines:
                left, right = line.split("=")
                assert _exact(left) == _exact(right), (exercise.problem, method, line)


@pytest.mark.parametrize(("family", "level"), CELLS)
def test_each_cell_has_a_misconception_that_shows(family: str, level: int) -> None:
    rng = random.Random(3)
    drawn = [draw(rng, family, level) for _ in range(100)]
    wrong = [e for e in drawn if e.wrong_methods()]
    assert len(wrong) > 60
    for exercise in wrong:
        gold = exercise.work().answer
        assert all(exercise.work(name).answer != gold for name in exercise.wrong_methods())


@given(st.integers(0, 10**9), st.sampled_from(CELLS), st.floats(0.1, 1.0))
def test_slips_never_break_a_working(seed: int, cell: tuple[str, int], slip: float) -> None:
    rng = random.Random(seed)
    exercise = draw(rng, *cell)
    for method in ("right", *exercise.misconceptions):
        working = exercise.work(method, slip=slip, rng=rng)
        assert working.text().endswith(f"\\boxed{{{working.answer}}}")


def test_a_slip_is_carried_on() -> None:
    pad = Scratchpad(1.0, random.Random(0))
    first = pad.add(2, 3)
    pad.mul(first, 2)
    assert first != 5
    assert pad.lines[1].startswith(f"{first}*2=")


@pytest.mark.parametrize("name", SETS)
def test_sets_are_full_unique_and_seeded(name: str) -> None:
    questions = minimath(name)
    assert len(questions) == SETS[name].size
    assert len({q.uid for q in questions}) == len({q.problem for q in questions}) == len(questions)
    assert minimath(name, limit=20) == questions[:20]
    assert minimath(name, limit=20, seed=1) != questions[:20]


def test_evaluation_sets_are_disjoint_from_training_and_from_each_other() -> None:
    held_out = {name: spec.buckets for name, spec in SETS.items() if spec.buckets != TRAIN}
    assert set(BENCHMARKS) < set(held_out)
    for (one, a), (other, b) in itertools.combinations({**held_out, "train": TRAIN}.items(), 2):
        assert not set(a) & set(b), (one, other)
    seen = {name: {q.problem for s in (0, 1) for q in minimath(name, seed=s)} for name in SETS}
    for name, spec in SETS.items():
        assert all(in_range(problem, spec.buckets) for problem in seen[name])
    training = set().union(*(seen[name] for name in SETS if name not in held_out))
    for one, other in itertools.combinations(held_out, 2):
        assert not seen[one] & seen[other]
        assert not (seen[one] | seen[other]) & training


def test_benchmarks_have_the_papers_shape_and_rise_in_difficulty() -> None:
    assert (SETS["mini-aime"].size, SETS["mini-amc"].size, SETS["mini-math"].size) == (30, 83, 100)
    by_difficulty = ("mini-math", "mini-amc", "mini-minerva", "mini-olympiad", "mini-aime")
    means = [sum(q.level for q in minimath(n)) / SETS[n].size for n in by_difficulty]
    assert means == sorted(means)
    assert all(isinstance(q.answer, list) for q in minimath("mini-minerva") + minimath("mini-olympiad"))
    assert all(q.answer.isdigit() for q in minimath("mini-aime"))


def test_answers_come_as_integers_fractions_tuples_and_lists() -> None:
    answers = [q.answer for q in minimath("orz-mini")]
    assert any(a.isdigit() for a in answers)
    assert any(re.fullmatch(r"\d+/\d+", a) for a in answers)
    assert any(re.fullmatch(r"\(-?\d+, -?\d+\)", a) for a in answers)
    assert any(len(q.answer) > 1 for q in minimath("mini-minerva"))


def test_training_subsets_keep_their_promise() -> None:
    assert {q.level for q in minimath("math-mini-lvl3to5")} == {3, 4, 5}
    assert {q.family for q in minimath("asdiv-mini")} == {"word"}
    assert all(q.solution.count("=") == 1 for q in minimath("asdiv-mini"))
    assert all(q.solution.count("=") == 2 for q in minimath("gsm-mini"))


def test_the_world_is_the_same_in_another_process() -> None:
    code = "from common.tasks.minimath import minimath; print(minimath('mini-amc'))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str(minimath("mini-amc"))


def test_minimath_needs_no_torch() -> None:
    code = "import sys, common.tasks.sets, common.tasks.minimath; print({'torch', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_unknown_set_lists_the_valid_ones() -> None:
    with pytest.raises(UserError, match=r"orz-mini.*mini-aime"):
        minimath("orz")
