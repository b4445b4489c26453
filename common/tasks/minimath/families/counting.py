"""Counting: products, fence posts, pairs, inclusion and exclusion, choices of two kinds."""

from __future__ import annotations

import random

from common.tasks.minimath.exercise import Exercise, Number, Scratchpad


def level1(rng: random.Random) -> Exercise:
    a, b = rng.randint(2, 12), rng.randint(2, 9)
    first, second = rng.sample(("hats", "coats", "bags", "belts", "ties"), 2)
    return Exercise(
        f"{a} {first}, {b} {second}. Outfits?",
        right=lambda s: s.mul(a, b),
        misconceptions={"sum": lambda s: s.add(a, b)},
    )


def level2(rng: random.Random) -> Exercise:
    a = rng.randint(2, 25)
    b = a + rng.randint(4, 35)
    return Exercise(
        f"How many integers from {a} to {b}?",
        right=lambda s: s.add(s.sub(b, a), 1),
        misconceptions={"fence_post": lambda s: s.sub(b, a), "twice_off": lambda s: s.sub(s.sub(b, a), 1)},
    )


def level3(rng: random.Random) -> Exercise:
    n = rng.randint(4, 24)
    what = rng.choice(
        (
            "Handshakes of",
            "Games among",
            "Pairs from",
            "Lines through",
            "Teams of 2 from",
            "Duels of",
            "Chords on",
        )
    )
    return Exercise(
        f"{what} {n}?",
        right=lambda s: s.div(s.mul(n, s.sub(n, 1)), 2),
        misconceptions={
            "ordered": lambda s: s.mul(n, s.sub(n, 1)),
            "half": lambda s: s.div(s.mul(n, n), 2),
        },
    )


def level4(rng: random.Random) -> Exercise:
    p, q = rng.choice(((2, 3), (2, 5), (3, 4), (2, 7), (3, 5)))
    n = rng.randint(p * q, 60)
    return Exercise(
        f"Up to {n}, how many divisible by {p} or {q}?",
        right=lambda s: s.sub(_either(s, n, p, q), s.split(n, p * q)[0]),
        misconceptions={
            "both_counted_twice": lambda s: _either(s, n, p, q),
            "only_both": lambda s: s.split(n, s.mul(p, q))[0],
        },
    )


def level5(rng: random.Random) -> Exercise:
    n, m = rng.randint(3, 12), rng.randint(2, 15)
    return Exercise(
        f"Choose 2 of {n} men, 1 of {m} women. Ways?",
        right=lambda s: s.mul(s.div(s.mul(n, s.sub(n, 1)), 2), m),
        misconceptions={
            "ordered": lambda s: s.mul(s.mul(n, s.sub(n, 1)), m),
            "sum": lambda s: s.add(s.div(s.mul(n, s.sub(n, 1)), 2), m),
        },
    )


def _either(s: Scratchpad, n: int, p: int, q: int) -> Number:
    return s.add(s.split(n, p)[0], s.split(n, q)[0])


LEVELS = (level1, level2, level3, level4, level5)
