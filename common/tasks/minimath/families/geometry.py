"""Areas, from a rectangle (level 1) to a frame; midpoints with a tuple answer (half of level 5)."""

from __future__ import annotations

import random

from common.tasks.minimath.exercise import Exercise


def level1(rng: random.Random) -> Exercise:
    a, b = rng.randint(2, 15), rng.randint(2, 9)
    asks_area = rng.random() < 0.5
    area, perimeter = (lambda s: s.mul(a, b)), (lambda s: s.mul(2, s.add(a, b)))
    return Exercise(
        f"Rectangle {a} by {b}. {'Area' if asks_area else 'Perimeter'}?",
        right=area if asks_area else perimeter,
        misconceptions={"other_quantity": perimeter if asks_area else area, "sum": lambda s: s.add(a, b)},
    )


def level2(rng: random.Random) -> Exercise:
    base, height = rng.randint(2, 30), 2 * rng.randint(1, 5)
    return Exercise(
        f"Triangle base {base}, height {height}. Area?",
        right=lambda s: s.div(s.mul(base, height), 2),
        misconceptions={"not_halved": lambda s: s.mul(base, height), "sum": lambda s: s.add(base, height)},
    )


def level3(rng: random.Random) -> Exercise:
    a, b = rng.randint(2, 9), rng.randint(2, 40)
    perimeter = 2 * (a + b)
    return Exercise(
        f"Rectangle perimeter {perimeter}, side {a}. Area?",
        right=lambda s: s.mul(s.sub(s.div(perimeter, 2), a), a),
        misconceptions={
            "not_halved": lambda s: s.mul(s.sub(perimeter, a), a),
            "perimeter_times_side": lambda s: s.mul(perimeter, a),
        },
    )


def level4(rng: random.Random) -> Exercise:
    a, b, height = rng.randint(2, 12), rng.randint(2, 12), 2 * rng.randint(1, 5)
    return Exercise(
        f"Trapezoid sides {a},{b}, height {height}. Area?",
        right=lambda s: s.div(s.mul(s.add(a, b), height), 2),
        misconceptions={
            "not_halved": lambda s: s.mul(s.add(a, b), height),
            "one_side_only": lambda s: s.div(s.mul(a, height), 2),
        },
    )


def level5(rng: random.Random) -> Exercise:
    return _frame(rng) if rng.random() < 0.5 else _midpoint(rng)


def _frame(rng: random.Random) -> Exercise:
    a, b = rng.randint(4, 12), rng.randint(4, 9)
    return Exercise(
        f"Frame {a} by {b}, width 1. Area?",
        right=lambda s: s.sub(s.mul(a, b), s.mul(s.sub(a, 2), s.sub(b, 2))),
        misconceptions={
            "width_once": lambda s: s.sub(s.mul(a, b), s.mul(s.sub(a, 1), s.sub(b, 1))),
            "perimeter": lambda s: s.mul(2, s.add(a, b)),
        },
    )


def _midpoint(rng: random.Random) -> Exercise:
    x, y = rng.randint(0, 12), rng.randint(0, 12)
    u, v = x + 2 * rng.randint(1, 5), y + 2 * rng.randint(1, 5)
    return Exercise(
        f"Midpoint of ({x},{y}),({u},{v})?",
        right=lambda s: (s.div(s.add(x, u), 2), s.div(s.add(y, v), 2)),
        misconceptions={
            "half_difference": lambda s: (s.div(s.sub(u, x), 2), s.div(s.sub(v, y), 2)),
            "not_halved": lambda s: (s.add(x, u), s.add(y, v)),
        },
    )


LEVELS = (level1, level2, level3, level4, level5)
