"""An exercise: a question together with every way of working it that the mini-world knows.

Invariant: `Exercise.right` is the only method whose answer is the gold answer; a misconception is a wrong method
that is carried out faithfully, so a response goes wrong where the method is chosen and not at random later
(what the length-bias study needs, and what reinforcement learning can unlearn).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

Number = int | Fraction
Value = Number | tuple[Number, ...]


def simplify(value: Number) -> Number:
    """An integral fraction becomes an int, so that it prints and divides like one."""
    return int(value) if isinstance(value, Fraction) and value.denominator == 1 else value


def spell(value: Value) -> str:
    """Gold spelling that the verifier accepts: `17`, `3/4`, `(2, 5)`."""
    if isinstance(value, tuple):
        return "(" + ", ".join(spell(v) for v in value) + ")"
    return str(value)


class Scratchpad:
    """Writes the lines of a working; each operation appends one line and returns the value written there.

    Args:
        slip: probability that a line's result is off by a little; the slip is carried on faithfully.
        rng: source of the slips; needed only when `slip` > 0.
    """

    def __init__(self, slip: float = 0.0, rng: random.Random | None = None) -> None:
        self.lines: list[str] = []
        self._slip = slip
        self._rng = rng

    def add(self, a: Number, b: Number) -> Number:
        return self._operate(a, "+", b, a + b)

    def sub(self, a: Number, b: Number) -> Number:
        return self._operate(a, "-", b, a - b)

    def mul(self, a: Number, b: Number) -> Number:
        return self._operate(a, "*", b, a * b)

    def div(self, a: Number, b: Number) -> Number:
        return self._operate(a, "/", b, Fraction(a) / Fraction(b) if b else 0)

    def split(self, a: Number, m: Number) -> tuple[Number, Number]:
        """Division with remainder, one line `17=3*5+2`; returns (quotient, remainder)."""
        quotient, rest = divmod(a, m) if m else (0, a)
        rest = self._maybe_slip(rest)
        self.note(f"{a}={quotient}*{m}+{rest}")
        return quotient, rest

    def let(self, name: str, value: Number) -> Number:
        """A line that only states a value, such as `x=4`."""
        self.note(f"{name}={value}")
        return value

    def note(self, line: str) -> None:
        self.lines.append(line)

    def _operate(self, a: Number, sign: str, b: Number, exact: Number) -> Number:
        result = self._maybe_slip(simplify(exact))
        self.note(f"{self._operand(a, sign)}{sign}{self._operand(b, sign, second=True)}={result}")
        return result

    def _maybe_slip(self, value: Number) -> Number:
        if self._slip and self._rng is not None and self._rng.random() < self._slip:
            return value + self._rng.choice((-10, -2, -1, 1, 2, 10))
        return value

    @staticmethod
    def _operand(value: Number, sign: str, second: bool = False) -> str:
        clear = not (isinstance(value, Fraction) and sign in "*/") and not (second and value < 0)
        return str(value) if clear else f"({value})"


Method = Callable[[Scratchpad], Value]


@dataclass(frozen=True)
class Working:
    """One way through an exercise: its lines and the answer that they lead to."""

    lines: tuple[str, ...]
    answer: str

    def text(self) -> str:
        return "\n".join((*self.lines, f"\\boxed{{{self.answer}}}"))


@dataclass(frozen=True)
class Exercise:
    """A drawn question with its right method and the misconceptions that apply to it."""

    problem: str
    right: Method
    misconceptions: Mapping[str, Method]

    def work(self, method: str = "right", *, slip: float = 0.0, rng: random.Random | None = None) -> Working:
        """Carries out a method, `right` or a key of `misconceptions`."""
        pad = Scratchpad(slip, rng)
        value = (self.right if method == "right" else self.misconceptions[method])(pad)
        return Working(tuple(pad.lines), spell(value))

    def wrong_methods(self) -> list[str]:
        """Misconceptions that give a wrong answer here (some coincide with the truth by luck)."""
        gold = self.work().answer
        return [name for name in self.misconceptions if self.work(name).answer != gold]


@dataclass(frozen=True)
class Question:
    """A question as training and evaluation see it.

    `answer` is a string, or a list of strings of which any is accepted (as in Minerva and OlympiadBench);
    `solution` is the right working, ending in `\\boxed{answer}`; `uid` depends only on the text.
    """

    problem: str
    answer: str | list[str]
    solution: str
    family: str
    level: int
    uid: str


def text_hash(problem: str) -> int:
    """A hash of the question's text that no process, seed or Python version changes."""
    return int.from_bytes(hashlib.blake2b(problem.encode(), digest_size=8).digest(), "big")
