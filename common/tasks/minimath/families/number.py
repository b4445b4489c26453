"""Number theory: remainders, gcd by Euclid's algorithm, lcm, last digits of powers, powers modulo m."""

from __future__ import annotations

import random

from common.tasks.minimath.exercise import Exercise, Number, Scratchpad


def level1(rng: random.Random) -> Exercise:
    m = rng.randint(3, 12)
    a = m * rng.randint(1, 9) + rng.randint(0, m - 1)
    return Exercise(
        f"{a} mod {m}=?",
        right=lambda s: s.split(a, m)[1],
        misconceptions={
            "quotient_given": lambda s: s.split(a, m)[0],
            "subtracts_once": lambda s: s.sub(a, m),
        },
    )


def level2(rng: random.Random) -> Exercise:
    g = rng.randint(2, 12)
    a, b = g * rng.randint(2, 9), g * rng.randint(2, 9)
    a, b = max(a, b), min(a, b)
    return Exercise(
        f"gcd({a},{b})=?",
        right=lambda s: _euclid(s, a, b),
        misconceptions={"difference": lambda s: s.sub(a, b), "product": lambda s: s.mul(a, b)},
    )


def level3(rng: random.Random) -> Exercise:
    g = rng.randint(2, 6)
    a, b = g * rng.randint(2, 12), g * rng.randint(2, 9)
    a, b = max(a, b), min(a, b)
    return Exercise(
        f"lcm({a},{b})=?",
        right=lambda s: s.mul(a, s.div(b, _euclid(s, a, b))),
        misconceptions={"gcd_given": lambda s: _euclid(s, a, b), "sum": lambda s: s.add(a, b)},
    )


def level4(rng: random.Random) -> Exercise:
    a, n = 10 * rng.randint(1, 29) + rng.choice((2, 3, 4, 7, 8, 9)), rng.randint(2, 4)
    return Exercise(
        f"last digit of {a}^{n}?",
        right=lambda s: _power(s, a % 10, n, 10),
        misconceptions={"times_exponent": lambda s: s.split(s.mul(a % 10, n), 10)[1]},
    )


def level5(rng: random.Random) -> Exercise:
    m, n = rng.randint(4, 12), rng.randint(2, 4)
    a = rng.randint(m + 1, 4 * m)
    return Exercise(
        f"{a}^{n} mod {m}=?",
        right=lambda s: _power(s, s.split(a, m)[1], n, m),
        misconceptions={
            "times_exponent": lambda s: s.split(s.mul(s.split(a, m)[1], n), m)[1],
            "power_ignored": lambda s: s.split(a, m)[1],
        },
    )


def _euclid(s: Scratchpad, a: Number, b: Number) -> Number:
    while b > 0:
        a, b = b, s.split(int(a), int(b))[1]
        b = min(b, a - 1)  # after a slip the remainder could otherwise grow for ever
    return a


def _power(s: Scratchpad, base: Number, exponent: int, m: int) -> Number:
    result = base
    for _ in range(exponent - 1):
        result = s.split(int(s.mul(result, base)), m)[1]
    return result


LEVELS = (level1, level2, level3, level4, level5)
