"""Values of scalar trees: exact rationals where possible, else many-digit numbers.

Invariant: every operation is bounded before it starts. Integers stay under MAX_BITS, other magnitudes within
10^±MAX_EXPONENT, sums under MAX_TERMS; anything larger raises `UndecidedError` at once instead of being computed.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import mpmath

from .functions import ARITHMETIC, FUNCTIONS
from .nodes import Node

MAX_BITS = 1 << 17
MAX_EXPONENT = 350
MAX_TERMS = 2000
MAX_FACTORIAL = 5000
MAX_STEPS = 20_000  # operations; a transcendental one counts for several, by its digits
MAX_WORK = 5_000_000  # bits of all exact intermediate results together

Value = Any  # Fraction | mpf | mpc: mpmath ships no types


class UndecidedError(ArithmeticError):
    """The value is too large to compute, or the tree has none."""


class UndefinedError(ArithmeticError):
    """The expression has no value at this point (division by zero, root of a negative in the reals)."""


_LOCAL = threading.local()


def context(digits: int) -> Any:
    """This thread's arithmetic context; mpmath's global one is shared by all threads."""
    contexts = _LOCAL.__dict__.setdefault("contexts", {})
    if digits not in contexts:
        contexts[digits] = mpmath.MPContext()
        contexts[digits].dps = digits
    return contexts[digits]


class Evaluator:
    """Evaluates one tree at one point.

    Args:
        digits: decimal digits of the working precision.
        point: values of the free symbols.
        real: whether roots, logarithms and powers outside of the reals are undefined.
        degree: what one degree counts for: 1, or pi / 180.
    """

    def __init__(
        self,
        digits: int,
        point: Mapping[str, Value] | None = None,
        *,
        real: bool = False,
        radians: bool = False,
    ) -> None:
        self.ctx = context(digits)
        self.point = dict(point or {})
        self.real = real
        self.radians = radians
        self.steps = 0
        self.work = 0

    def __call__(self, node: Node) -> Value:
        """The value. Raises UndefinedError or UndecidedError."""
        try:
            return self.value(node)
        except (UndefinedError, UndecidedError):
            raise
        except (ZeroDivisionError, ValueError) as error:
            raise UndefinedError(str(error)) from error
        except Exception as error:  # a function with too few arguments, an overflow inside mpmath, ...
            raise UndecidedError(f"{type(error).__name__}: {error}") from error

    def value(self, node: Node) -> Value:
        """Dispatches on the operator and checks the size of the result."""
        self.spend(1)
        rule = _RULES.get(node.op)
        if rule is None:
            raise UndecidedError(node.op)
        return self.checked(rule(self, node))

    def spend(self, steps: int) -> None:
        """Counts steps against the budget."""
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise UndecidedError("too many steps")

    def checked(self, value: Value) -> Value:
        """The value itself if its size is within bounds."""
        if isinstance(value, Fraction):
            above, below = value.numerator.bit_length(), value.denominator.bit_length()
            self.work += above + below
            if max(above, below) > MAX_BITS or self.work > MAX_WORK:
                raise UndecidedError("integers too large")
            return value
        if self.real and isinstance(value, self.ctx.mpc):
            if value.imag != 0:
                raise UndefinedError("not real")
            value = value.real
        if not self.ctx.isfinite(value):
            raise UndefinedError("infinite")
        if value != 0 and self.ctx.mag(value) > MAX_EXPONENT * 3.33:
            raise UndecidedError("a magnitude too large")
        return value

    def scaled(self, value: Value) -> Value:
        """A product or quotient, unless it is so small that it could pass for zero."""
        if not isinstance(value, Fraction) and value != 0 and self.ctx.mag(value) < -MAX_EXPONENT * 3.33:
            raise UndecidedError("a magnitude too small")
        return value

    def inexact(self, value: Value) -> Value:
        """A rational as a number of the context."""
        if not isinstance(value, Fraction):
            return value
        size = value.numerator.bit_length() - value.denominator.bit_length()
        if abs(size) > MAX_EXPONENT * 3.33 and value != 0:
            raise UndecidedError("a magnitude too large")
        return self.ctx.mpf(value.numerator) / value.denominator

    def pair(self, a: Value, b: Value) -> tuple[Value, Value]:
        """Both as they are if both are rational, else both inexact."""
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return a, b
        return self.inexact(a), self.inexact(b)

    # -- operators ----------------------------------------------------------------------------------------------

    def _num(self, node: Node) -> Value:
        return node.value.value

    def _sym(self, node: Node) -> Value:
        name = node.value
        if name in self.point:
            return self.point[name]
        if name == "pi":
            return +self.ctx.pi
        if name == "e":
            return +self.ctx.e
        if name == "i":
            return self.ctx.mpc(0, 1)
        raise UndecidedError(f"no value for {name}")

    def _add(self, node: Node) -> Value:
        total: Value = Fraction(0)
        for child in node.args:
            a, b = self.pair(total, self.value(child))
            total = self.checked(a + b)
        return total

    def _mul(self, node: Node) -> Value:
        total: Value = Fraction(1)
        for child in node.args:
            a, b = self.pair(total, self.value(child))
            total = self.checked(self.scaled(a * b))
        return total

    def _neg(self, node: Node) -> Value:
        return -self.value(node.args[0])

    def _div(self, node: Node) -> Value:
        a, b = self.pair(self.value(node.args[0]), self.value(node.args[1]))
        if b == 0:
            raise UndefinedError("division by zero")
        return self.scaled(a / b)

    def _pct(self, node: Node) -> Value:
        return self.value(node.args[0]) / 100

    def _deg(self, node: Node) -> Value:
        value = self.value(node.args[0])
        return self.inexact(value) * self.ctx.pi / 180 if self.radians else value

    def _mod(self, node: Node) -> Value:
        a, b = self.pair(self.value(node.args[0]), self.value(node.args[1]))
        if b == 0:
            raise UndefinedError("modulo zero")
        if isinstance(a, Fraction):
            return a - b * (a // b)
        return a - b * self.ctx.floor(a / b)

    def _pow(self, node: Node) -> Value:
        base = self.value(node.args[0])
        if base == self.ctx.e and node.args[0] == Node("sym", (), "e") and "e" not in self.point:
            return self.exp(self.value(node.args[1]))
        return self.power(base, self.value(node.args[1]))

    def exp(self, x: Value) -> Value:
        """e^x for arguments whose result is within bounds."""
        self.spend(self.ctx.dps // 4)
        x = self.inexact(x)
        if abs(self.ctx.re(x)) > MAX_EXPONENT * 2.31:
            raise UndecidedError("an exponential too large")
        return self.ctx.exp(x)

    def power(self, base: Value, exponent: Value) -> Value:
        """base^exponent: exact for integer exponents of moderate size; principal branch otherwise."""
        if isinstance(exponent, Fraction) and exponent.denominator == 1:
            n = int(exponent)
            if base == 0 and n <= 0:
                raise UndefinedError("zero to a power that is not positive")
            if isinstance(base, Fraction):
                bits = max(base.numerator.bit_length(), base.denominator.bit_length())
                if base in (0, 1, -1):
                    return base ** (abs(n) % 2 + 2)
                if bits * abs(n) > MAX_BITS:
                    raise UndecidedError("a power too large")
                return base**n
            if base != 0 and abs(self.ctx.mag(base) * n) > MAX_EXPONENT * 4:
                raise UndecidedError("a power too large")
            if abs(n) > 10**6:
                raise UndecidedError("a power too large")
            return base**n
        return self.general_power(base, exponent)

    def general_power(self, base: Value, exponent: Value) -> Value:
        """A power whose exponent is not an integer."""
        if isinstance(base, Fraction) and isinstance(exponent, Fraction):
            if (
                abs(exponent.numerator) * max(base.numerator.bit_length(), base.denominator.bit_length())
                > MAX_BITS
            ):
                raise UndecidedError("a power too large")
            if (
                base > 0
                and exponent.denominator <= 64
                and (root := _exact_root(base, exponent.denominator)) is not None
            ):
                return root**exponent.numerator
        base, exponent = self.inexact(base), self.inexact(exponent)
        if base == 0:
            if self.ctx.re(exponent) > 0:
                return Fraction(0)
            raise UndefinedError("zero to a power that is not positive")
        if self.real and self.ctx.re(base) < 0:
            raise UndefinedError("a fractional power of a negative number")
        return self.exp(exponent * self.ctx.log(base))

    def _fact(self, node: Node) -> Value:
        return self.factorial(self.value(node.args[0]))

    def factorial(self, value: Value) -> Value:
        """x!, exact for integers, Gamma(x + 1) for other real numbers."""
        if isinstance(value, Fraction) and value.denominator == 1:
            if not 0 <= value <= MAX_FACTORIAL:
                raise UndecidedError("a factorial too large")
            return Fraction(math.factorial(int(value)))
        if abs(value) > 150:
            raise UndecidedError("a factorial too large")
        self.spend(self.ctx.dps)
        return self.ctx.gamma(self.inexact(value) + 1)

    def _func(self, node: Node) -> Value:
        if node.value == "det":
            return self.determinant(node.args)
        arguments = [self.value(a) for a in node.args]
        if rule := ARITHMETIC.get(node.value):
            return rule(self, *arguments)
        if rule := FUNCTIONS.get(node.value):
            self.spend(self.ctx.dps // 4)
            return rule(self, *(self.inexact(a) for a in arguments))
        raise UndecidedError(node.value)

    def determinant(self, cells: tuple[Node, ...]) -> Value:
        """By expansion along the first row, for at most 5 x 5."""
        size = math.isqrt(len(cells))
        if size * size != len(cells) or size > 5:
            raise UndecidedError("determinant")
        values = [self.value(a) for a in cells]
        return self._minor([values[k * size : (k + 1) * size] for k in range(size)])

    def _minor(self, rows: list[list[Value]]) -> Value:
        if len(rows) == 1:
            return rows[0][0]
        total: Value = Fraction(0)
        for k, head in enumerate(rows[0]):
            a, b = self.pair(head, self._minor([row[:k] + row[k + 1 :] for row in rows[1:]]))
            total, term = self.pair(total, a * b * (-1) ** k)
            total += term
        return total

    def _apply(self, node: Node) -> Value:
        """An unknown function: a fixed smooth function drawn from its name, the same wherever the name occurs."""
        a, b, c = (self.inexact(x) for x in _draw(node.value))
        total = self.ctx.mpf(0)
        for k, child in enumerate(node.args):
            x = self.inexact(self.value(child))
            total += (k + 1) * (a * x * x + b * x + c / (x * x + 7))
        return total

    def _big(self, node: Node) -> Value:
        lower, upper = self.value(node.args[0]), self.value(node.args[1])
        if not all(isinstance(x, Fraction) and x.denominator == 1 for x in (lower, upper)):
            raise UndecidedError("bounds that are not integers")
        if upper - lower > MAX_TERMS:
            raise UndecidedError("too many terms")
        saved = self.point.get(node.value)
        total: Value = Fraction(0 if node.op == "sum" else 1)
        for k in range(int(lower), int(upper) + 1):
            self.point[node.value] = Fraction(k)
            a, b = self.pair(total, self.value(node.args[2]))
            total = self.checked(a + b if node.op == "sum" else a * b)
        if saved is None:
            self.point.pop(node.value, None)
        else:
            self.point[node.value] = saved
        return total


def _draw(name: str) -> tuple[Fraction, Fraction, Fraction]:
    digest = hashlib.blake2b(name.encode(), digest_size=12).digest()
    a, b, c = (int.from_bytes(digest[k : k + 4], "big") % 9973 + 1 for k in (0, 4, 8))
    return Fraction(a, 9973), Fraction(b, 9973), Fraction(c, 9973)


def _exact_root(value: Fraction, degree: int) -> Fraction | None:
    """The rational root if there is one."""
    above, below = _integer_root(value.numerator, degree), _integer_root(value.denominator, degree)
    return None if above is None or below is None else Fraction(above, below)


def _integer_root(n: int, degree: int) -> int | None:
    root = mpmath.libmp.libintmath.isqrt(n) if degree == 2 else _newton_root(n, degree)
    return int(root) if root**degree == n else None


def _newton_root(n: int, degree: int) -> int:
    low, high = 0, 1 << (n.bit_length() // degree + 1)
    while low < high:
        middle = (low + high + 1) // 2
        if middle**degree <= n:
            low = middle
        else:
            high = middle - 1
    return low


_RULES: dict[str, Callable[[Evaluator, Node], Value]] = {
    "num": Evaluator._num, "sym": Evaluator._sym, "add": Evaluator._add, "mul": Evaluator._mul, "neg": Evaluator._neg,
    "div": Evaluator._div, "pct": Evaluator._pct, "deg": Evaluator._deg, "mod": Evaluator._mod, "pow": Evaluator._pow,
    "fact": Evaluator._fact, "func": Evaluator._func, "apply": Evaluator._apply, "sum": Evaluator._big,
    "prod": Evaluator._big,
}  # fmt: skip
