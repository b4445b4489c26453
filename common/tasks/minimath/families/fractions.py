"""Fractions: equal denominators (level 1), a part of a number, unlike denominators, division, a product in a sum.

Sums and products are written unreduced first (`3/6+2/6=5/6`), then reduced: an unreduced answer is wrong for
the paper's fast grader.
"""

from __future__ import annotations

import random
from fractions import Fraction

from common.tasks.minimath.exercise import Exercise, Number, Scratchpad, simplify


def level1(rng: random.Random) -> Exercise:
    n = rng.randint(3, 12)
    a, b = rng.randint(1, n - 1), rng.randint(1, n - 1)
    return Exercise(
        f"{a}/{n}+{b}/{n}=?",
        right=lambda s: _reduce(s, s.add(a, b), n),
        misconceptions={"denominators_added": lambda s: _reduce(s, s.add(a, b), s.add(n, n))},
    )


def level2(rng: random.Random) -> Exercise:
    n, unit = rng.randint(3, 9), rng.randint(2, 9)
    a, whole = rng.randint(2, n - 1), n * unit
    return Exercise(
        f"{a}/{n} of {whole}=?",
        right=lambda s: s.mul(s.div(whole, n), a),
        misconceptions={
            "numerator_ignored": lambda s: s.div(whole, n),
            "rest_taken": lambda s: s.sub(whole, s.mul(s.div(whole, n), a)),
        },
    )


def level3(rng: random.Random) -> Exercise:
    n = rng.randint(2, 9)
    m = rng.choice([k for k in range(2, 10) if k != n])
    a, b = rng.randint(1, n - 1), rng.randint(1, m - 1)
    return Exercise(
        f"{a}/{n}+{b}/{m}=?",
        right=lambda s: _cross_add(s, a, n, b, m),
        misconceptions={
            "denominators_added": lambda s: _reduce(s, s.add(a, b), s.add(n, m)),
            "numerators_kept": lambda s: _reduce(s, s.add(a, b), s.mul(n, m)),
        },
    )


def level4(rng: random.Random) -> Exercise:
    b, d = rng.randint(2, 9), rng.randint(2, 9)
    a, c = rng.randint(1, 9), rng.randint(1, 9)
    return Exercise(
        f"({a}/{b})/({c}/{d})=?",
        right=lambda s: _reduce(s, s.mul(a, d), s.mul(b, c)),
        misconceptions={"not_inverted": lambda s: _reduce(s, s.mul(a, c), s.mul(b, d))},
    )


def level5(rng: random.Random) -> Exercise:
    n, c, d = rng.randint(2, 5), rng.randint(1, 4), rng.randint(2, 5)
    a, m = rng.randint(1, n), rng.randint(2, 5)
    return Exercise(
        f"{a}/{n}+{c}/{d}*1/{m}=?",
        right=lambda s: _cross_add(s, a, n, c, s.mul(d, m)),
        misconceptions={
            "sum_first": lambda s: _reduce(s, s.add(s.mul(a, d), s.mul(c, n)), s.mul(s.mul(n, d), m)),
            "denominators_added": lambda s: _reduce(s, s.add(a, c), s.add(n, s.mul(d, m))),
        },
    )


def _cross_add(s: Scratchpad, a: Number, n: Number, b: Number, m: Number) -> Number:
    top = s.add(s.mul(a, m), s.mul(b, n))
    return _reduce(s, top, s.mul(n, m))


def _reduce(s: Scratchpad, top: Number, bottom: Number) -> Number:
    value = simplify(Fraction(top) / Fraction(bottom or 1))
    s.note(f"{top}/{bottom}={value}")
    return value


LEVELS = (level1, level2, level3, level4, level5)
