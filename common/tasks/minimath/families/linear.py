"""Linear equations in one unknown (levels 1 to 4) and a pair of equations with a tuple answer (level 5)."""

from __future__ import annotations

import random

from common.tasks.minimath.exercise import Exercise, Number, Scratchpad


def level1(rng: random.Random) -> Exercise:
    a, x = rng.randint(2, 25), rng.randint(2, 25)
    total = a + x
    return Exercise(
        f"x+{a}={total}, x=?",
        right=lambda s: s.sub(total, a),
        misconceptions={"sign_kept": lambda s: s.add(total, a)},
    )


def level2(rng: random.Random) -> Exercise:
    a, x, b = rng.randint(2, 9), rng.randint(2, 9), rng.randint(1, 15)
    total = a * x + b
    return Exercise(
        f"{a}x+{b}={total}, x=?",
        right=lambda s: s.div(s.sub(total, b), a),
        misconceptions={
            "sign_kept": lambda s: s.div(s.add(total, b), a),
            "not_divided": lambda s: s.sub(total, b),
            "divides_first": lambda s: s.sub(total, a),
        },
    )


def level3(rng: random.Random) -> Exercise:
    c, extra, x = rng.randint(2, 5), rng.randint(2, 6), rng.randint(2, 12)
    a = c + extra
    b = rng.randint(1, 20)
    d = extra * x + b
    return Exercise(
        f"{a}x+{b}={c}x+{d}, x=?",
        right=lambda s: s.div(s.sub(d, b), s.sub(a, c)),
        misconceptions={
            "coefficients_added": lambda s: s.div(s.sub(d, b), s.add(a, c)),
            "constants_added": lambda s: s.div(s.add(d, b), s.sub(a, c)),
        },
    )


def level4(rng: random.Random) -> Exercise:
    a, b, x = rng.randint(2, 9), rng.randint(1, 9), rng.randint(2, 12)
    total = a * (x + b)
    return Exercise(
        f"{a}(x+{b})={total}, x=?",
        right=lambda s: s.sub(s.div(total, a), b),
        misconceptions={
            "bracket_not_distributed": lambda s: s.div(s.sub(total, b), a),
            "not_subtracted": lambda s: s.div(total, a),
        },
    )


def level5(rng: random.Random) -> Exercise:
    y = rng.randint(1, 24)
    x = y + rng.randint(1, 24)
    total, gap = x + y, x - y

    def pair(s: Scratchpad, double: Number) -> tuple[Number, Number]:
        first = s.div(double, 2)
        return first, s.sub(total, first)

    return Exercise(
        f"x+y={total}, x-y={gap}, (x,y)=?",
        right=lambda s: pair(s, s.add(total, gap)),
        misconceptions={
            "subtracted": lambda s: pair(s, s.sub(total, gap)),
            "not_halved": lambda s: ((x2 := s.add(total, gap)), s.sub(x2, total)),
        },
    )


LEVELS = (level1, level2, level3, level4, level5)
