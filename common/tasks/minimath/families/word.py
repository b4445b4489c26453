"""Word problems: one operation (level 1, ASDiv-like), two steps (level 2, GSM-like), rates (levels 3 to 5)."""

from __future__ import annotations

import random

from common.tasks.minimath.exercise import Exercise

_NAMES = ("Ann", "Ben", "Eva", "Tom", "Mia", "Sam", "Leo", "Zoe")
_THINGS = ("nuts", "pens", "eggs", "figs", "cups", "keys", "pins", "bags")


def level1(rng: random.Random) -> Exercise:
    name, things = rng.choice(_NAMES), rng.choice(_THINGS)
    kind = rng.choice("+-*/")
    if kind in "+-":
        a, b = rng.randint(8, 40), rng.randint(2, 25)
        a, b = max(a, b), min(a, b)
        verb = "gets" if kind == "+" else "loses"
        right, wrong = ("add", "sub") if kind == "+" else ("sub", "add")
        text = f"{name} has {a} {things}, {verb} {b}. Now?"
    else:
        b, c = rng.randint(2, 9), rng.randint(2, 9)
        a = c if kind == "*" else b * c
        right, wrong = ("mul", "add") if kind == "*" else ("div", "sub")
        text = f"{b} boxes of {a} {things}. All?" if kind == "*" else f"{a} {things} in {b} boxes. Each?"
    first, second = (b, a) if kind == "*" else (a, b)
    return Exercise(
        text,
        right=lambda s: getattr(s, right)(first, second),
        misconceptions={"wrong_operation": lambda s: getattr(s, wrong)(first, second)},
    )


def level2(rng: random.Random) -> Exercise:
    name, things = rng.choice(_NAMES), rng.choice(_THINGS)
    boxes, each = rng.randint(2, 9), rng.randint(3, 9)
    gains = rng.random() < 0.5
    extra = rng.randint(2, 19) if gains else rng.randint(2, min(19, boxes * each - 1))
    ending = f"gets {extra}. Now?" if gains else f"loses {extra}. Now?"
    last, other = ("add", "sub") if gains else ("sub", "add")
    return Exercise(
        f"{name} has {boxes} boxes of {each} {things}, {ending}",
        right=lambda s: getattr(s, last)(s.mul(boxes, each), extra),
        misconceptions={
            "boxes_added": lambda s: getattr(s, last)(s.add(boxes, each), extra),
            "wrong_last_operation": lambda s: getattr(s, other)(s.mul(boxes, each), extra),
            "last_step_dropped": lambda s: s.mul(boxes, each),
        },
    )


def level3(rng: random.Random) -> Exercise:
    things = rng.choice(_THINGS)
    n, price, m = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 9)
    total = n * price
    return Exercise(
        f"{n} {things} cost {total}. Cost of {m}?",
        right=lambda s: s.mul(s.div(total, n), m),
        misconceptions={
            "additive": lambda s: s.add(total, s.sub(m, n)),
            "total_taken_as_price": lambda s: s.mul(total, m),
        },
    )


def level4(rng: random.Random) -> Exercise:
    hours, speed, time = rng.randint(2, 6), rng.randint(3, 12), rng.randint(2, 9)
    near, far = hours * speed, speed * time
    return Exercise(
        f"{near} km in {hours} h. Hours for {far} km?",
        right=lambda s: s.div(far, s.div(near, hours)),
        misconceptions={
            "additive": lambda s: s.add(s.sub(far, near), hours),
            "speed_given": lambda s: s.div(near, hours),
        },
    )


def level5(rng: random.Random) -> Exercise:
    a = rng.randint(3, 9)
    b = rng.randint(1, a - 1)
    hours = rng.randint(2, 9)
    tank = (a + b) * hours if (joint := rng.random() < 0.5) else (a - b) * hours
    verb, right, wrong = ("in", "add", "sub") if joint else ("out", "sub", "add")
    return Exercise(
        f"Tank of {tank}: {a}/h in, {b}/h {verb}. Hours?",
        right=lambda s: s.div(tank, getattr(s, right)(a, b)),
        misconceptions={
            "wrong_direction": lambda s: s.div(tank, getattr(s, wrong)(a, b)),
            "second_ignored": lambda s: s.div(tank, a),
        },
    )


LEVELS = (level1, level2, level3, level4, level5)
