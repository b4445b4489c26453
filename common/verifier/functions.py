"""The functions that answers may contain.

Invariant: a function is looked up only in these two tables, never by attribute or by name in a module. Rules get
the evaluator and the argument values; they raise its `UndefinedError` outside of their domain.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

Value = Any


def _whole(value: Value) -> bool:
    return isinstance(value, Fraction) and value.denominator == 1


def _gcd(ev: Any, *values: Value) -> Value:
    """Of rationals: gcd of numerators over lcm of denominators; 1 as soon as one is irrational."""
    if not all(isinstance(v, Fraction) for v in values):
        return Fraction(1)
    numerators, denominators = [v.numerator for v in values], [v.denominator for v in values]
    return Fraction(math.gcd(*numerators), math.lcm(*denominators))


def _lcm(ev: Any, *values: Value) -> Value:
    """Of rationals: lcm of numerators over gcd of denominators."""
    if not all(isinstance(v, Fraction) for v in values):
        raise ValueError("lcm of an irrational number")
    return Fraction(math.lcm(*(v.numerator for v in values)), math.gcd(*(v.denominator for v in values)))


def _extreme(sign: int) -> Callable[..., Value]:
    def rule(ev: Any, *values: Value) -> Value:
        best = values[0]
        for value in values[1:]:
            a, b = ev.pair(value, best)
            if sign * (ev.ctx.re(a) - ev.ctx.re(b)) > 0:
                best = value
        return best

    return rule


def _floor(ev: Any, x: Value) -> Value:
    return Fraction(math.floor(x)) if isinstance(x, Fraction) else Fraction(int(ev.ctx.floor(_real(ev, x))))


def _ceil(ev: Any, x: Value) -> Value:
    return -_floor(ev, -x)


def _real(ev: Any, x: Value) -> Value:
    if isinstance(x, ev.ctx.mpc):
        if x.imag != 0:
            raise ValueError("not real")
        return x.real
    return x


def _root(ev: Any, x: Value, degree: Value) -> Value:
    """The principal root; odd roots of negative real numbers are real, as people write them."""
    if degree == 0:
        raise ValueError("a zeroth root")
    if _whole(degree) and int(degree) % 2 == 1 and not isinstance(x, ev.ctx.mpc) and x < 0:
        return -ev.general_power(-x, 1 / degree) if degree != 1 else x
    if isinstance(degree, Fraction):
        return ev.power(x, 1 / degree)
    return ev.general_power(x, 1 / degree)


def _binom(ev: Any, n: Value, k: Value) -> Value:
    if _whole(n) and _whole(k):
        if not 0 <= n <= 5000:
            raise OverflowError("a binomial coefficient too large")
        return Fraction(math.comb(int(n), int(k))) if k >= 0 else Fraction(0)
    return ev.factorial(n) / (ev.factorial(k) * ev.factorial(n - k))


def _logarithm(ev: Any, x: Value, base: Value | None = None) -> Value:
    """Natural unless a base is given."""
    if x == 0 or base == 1 or base == 0:
        raise ValueError("logarithm of zero")
    if ev.real and ev.ctx.re(x) <= 0:
        raise ValueError("logarithm outside of the reals")
    return ev.ctx.log(x) if base is None else ev.ctx.log(x) / ev.ctx.log(base)


ARITHMETIC: dict[str, Callable[..., Value]] = {
    "gcd": _gcd,
    "lcm": _lcm,
    "max": _extreme(1),
    "min": _extreme(-1),
    "abs": lambda ev, x: abs(x),
    "norm": lambda ev, x: abs(x),
    "floor": _floor,
    "ceil": _ceil,
    "root": _root,
    "sqrt": lambda ev, x: _root(ev, x, Fraction(2)),
    "cbrt": lambda ev, x: _root(ev, x, Fraction(3)),
    "binom": _binom,
    "exp": lambda ev, x: ev.exp(x),
}
"""Rules that keep rationals exact."""


def _plain(name: str) -> Callable[..., Value]:
    def rule(ev: Any, x: Value) -> Value:
        if abs(x) > 10**30 or (name.endswith("h") and abs(x) > 700):
            raise OverflowError("an argument too large")
        return getattr(ev.ctx, _MPMATH.get(name, name))(x)

    return rule


_MPMATH = {
    f"arc{f}": f"a{f}" for f in ["sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "coth"]
}
_PLAIN = ["sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "coth"]

FUNCTIONS: dict[str, Callable[..., Value]] = {
    **{name: _plain(name) for name in [*_PLAIN, *_MPMATH]},
    "log": _logarithm,
    "ln": _logarithm,
    "lg": lambda ev, x: _logarithm(ev, x, ev.ctx.mpf(10)),
    "Gamma": lambda ev, x: ev.factorial(x - 1),
}
"""Rules on inexact numbers; `getattr` above only ever sees names from these literals."""
