"""Chains of + - *: a single operation (level 1) up to brackets and three operations (level 5)."""

from __future__ import annotations

import random

from common.tasks.minimath.exercise import Exercise, Number, Scratchpad

_OPPOSITE = {"+": "sub", "-": "add", "*": "add"}
_NAME = {"+": "add", "-": "sub", "*": "mul"}


def level1(rng: random.Random) -> Exercise:
    op = rng.choice("+-*")
    a, b = (rng.randint(3, 12), rng.randint(2, 9)) if op == "*" else (rng.randint(10, 60), rng.randint(2, 30))
    a, b = (max(a, b), min(a, b)) if op == "-" else (a, b)
    return Exercise(
        f"{a}{op}{b}=?",
        right=lambda s: getattr(s, _NAME[op])(a, b),
        misconceptions={"wrong_operation": lambda s: getattr(s, _OPPOSITE[op])(a, b)},
    )


def level2(rng: random.Random) -> Exercise:
    a, b, c = rng.randint(2, 20), rng.randint(2, 9), rng.randint(2, 9)
    return Exercise(
        f"{a}+{b}*{c}=?",
        right=lambda s: s.add(a, s.mul(b, c)),
        misconceptions={
            "left_to_right": lambda s: s.mul(s.add(a, b), c),
            "adds_all": lambda s: s.add(s.add(a, b), c),
        },
    )


def level3(rng: random.Random) -> Exercise:
    a, b, c = rng.randint(20, 60), rng.randint(2, 9), rng.randint(2, 9)
    d = rng.randint(2, 19)
    sign = rng.choice("+-")

    def right(s: Scratchpad) -> Number:
        product = s.mul(b, c)
        return s.sub(s.add(a, product), d) if sign == "+" else s.add(s.sub(a, product), d)

    return Exercise(
        f"{a}{sign}{b}*{c}{'-' if sign == '+' else '+'}{d}=?",
        right=right,
        misconceptions={
            "last_term_dropped": lambda s: (s.add if sign == "+" else s.sub)(a, s.mul(b, c)),
            "signs_swapped": lambda s: (
                s.add(s.sub(a, s.mul(b, c)), d) if sign == "+" else s.sub(s.add(a, s.mul(b, c)), d)
            ),
        },
    )


def level4(rng: random.Random) -> Exercise:
    a, b, c, d = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 5), rng.randint(2, 20)
    return Exercise(
        f"({a}+{b})*{c}-{d}=?",
        right=lambda s: s.sub(s.mul(s.add(a, b), c), d),
        misconceptions={
            "brackets_ignored": lambda s: s.sub(s.add(a, s.mul(b, c)), d),
            "adds_instead": lambda s: s.add(s.mul(s.add(a, b), c), d),
        },
    )


def level5(rng: random.Random) -> Exercise:
    a, b = rng.randint(2, 9), rng.randint(2, 8)
    c = rng.randint(6, 12)
    d, e, f = rng.randint(1, 4), rng.randint(2, 9), rng.randint(2, 9)
    return Exercise(
        f"({a}+{b})*({c}-{d})-{e}*{f}=?",
        right=lambda s: s.sub(s.mul(s.add(a, b), s.sub(c, d)), s.mul(e, f)),
        misconceptions={
            "last_product_split": lambda s: s.mul(s.sub(s.mul(s.add(a, b), s.sub(c, d)), e), f),
            "second_bracket_added": lambda s: s.sub(s.mul(s.add(a, b), s.add(c, d)), s.mul(e, f)),
        },
    )


LEVELS = (level1, level2, level3, level4, level5)
