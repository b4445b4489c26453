"""Countdown, an example of a second task: reach a target from given numbers with + - * /.

Invariant: the reward of a response is 1 if its equation uses exactly the given numbers and gives the target,
0.1 if it only has the asked form, else 0 (the shaped reward of the blog that the paper links to); no response
is ever evaluated as code.

A custom reward is any function `(response: str, question: dict) -> float`; a recipe names it as
`reward = "common.tasks.countdown:reward"`.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

FORMAT_REWARD = 0.1
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_TOKEN = re.compile(r"\s*(\d+|[-+*/()])")
_LONGEST = 200


def countdown(size: int, *, seed: int = 0, numbers: int = 3, largest: int = 20) -> list[dict[str, Any]]:
    """Solvable questions: rows with `uid`, `problem`, `answer` (the target), `numbers`."""
    rng = random.Random(f"countdown/{seed}")
    rows = []
    for index in range(size):
        given, target = _draw(rng, numbers, largest)
        listed = ", ".join(map(str, given))
        rows.append(
            {
                "uid": f"countdown/{seed}/{index}",
                "problem": f"Using {listed} once each, make {target}.",
                "answer": str(target),
                "numbers": given,
            }
        )
    return rows


def reward(response: str, question: Mapping[str, Any]) -> float:
    """Shaped reward in {0, 0.1, 1}; `question` needs `numbers` (list of int) and `answer` (the target)."""
    found = _ANSWER.findall(response) or _BOXED.findall(response)
    if not found:
        return 0.0
    expression = found[-1].partition("=")[0].strip()
    tokens = _tokens(expression)
    if tokens is None:
        return FORMAT_REWARD
    used = Counter(int(t) for t in tokens if t.isdigit())
    if used != Counter(question["numbers"]):
        return FORMAT_REWARD
    value = _value(tokens)
    return 1.0 if value is not None and value == Fraction(str(question["answer"])) else FORMAT_REWARD


def _draw(rng: random.Random, numbers: int, largest: int) -> tuple[list[int], int]:
    """Combines the numbers at random, so that a solution is known to exist."""
    while True:
        given = [rng.randint(1, largest) for _ in range(numbers)]
        value = given[0]
        for number in given[1:]:
            value = rng.choice((value + number, value - number, value * number))
        if 0 < value <= 5 * largest:
            return rng.sample(given, numbers), value


def _tokens(expression: str) -> list[str] | None:
    """Numbers, operators and brackets; None if anything else occurs or the text is too long."""
    if not expression or len(expression) > _LONGEST:
        return None
    tokens: list[str] = []
    position = 0
    while position < len(expression):
        match = _TOKEN.match(expression, position)
        if match is None:
            return None if expression[position:].strip() else tokens
        tokens.append(match.group(1))
        position = match.end()
    return tokens


def _value(tokens: list[str]) -> Fraction | None:
    """Exact value by recursive descent; None if the expression is malformed or divides by zero."""
    stream = _Stream(tokens)
    try:
        value = _sum(stream)
    except (ValueError, ZeroDivisionError):
        return None
    return value if stream.peek() is None else None


class _Stream:
    def __init__(self, tokens: list[str]) -> None:
        self._iterator: Iterator[str] = iter(tokens)
        self._next = next(self._iterator, None)

    def peek(self) -> str | None:
        return self._next

    def take(self) -> str:
        token, self._next = self._next, next(self._iterator, None)
        if token is None:
            raise ValueError("expression ends too early")
        return token


def _sum(stream: _Stream) -> Fraction:
    value = _product(stream)
    while stream.peek() in ("+", "-"):
        value = value + _product(stream) if stream.take() == "+" else value - _product(stream)
    return value


def _product(stream: _Stream) -> Fraction:
    value = _atom(stream)
    while stream.peek() in ("*", "/"):
        value = value * _atom(stream) if stream.take() == "*" else value / _atom(stream)
    return value


def _atom(stream: _Stream) -> Fraction:
    token = stream.take()
    if token.isdigit():
        return Fraction(int(token))
    if token == "(":
        value = _sum(stream)
        if stream.take() != ")":
            raise ValueError("bracket not closed")
        return value
    if token == "-":
        return -_atom(stream)
    raise ValueError(f"unexpected {token}")
