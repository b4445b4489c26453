r"""Equality of two scalar expressions.

Invariant: two expressions are equal only if they have the same value to many digits (380 for constants) wherever both are
defined, at fixed pseudo-random points (identity testing in the manner of Schwartz and Zippel), or are rational and exactly
equal. This is what the paper's `sympy.simplify(difference) == 0` asks, but bounded in time and without rewriting.

An approximation counts only where a decimal stands against a number that has none: the gold answer shows at least
9 significant digits, or the response at least 12 and the gold answer is not an integer; the two must then agree to
the last digit shown. Two decimals, and anything against an integer, are compared exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

from .evaluate import Evaluator, UndecidedError, UndefinedError, Value, context
from .nodes import Node, contains, is_constant, symbols

QUICK_DIGITS = 40
POINT_DIGITS = 110  # at a random point nothing large has to cancel
SURE_DIGITS = 450
GOLD_DIGITS = 9
RESPONSE_DIGITS = 12


class Decimal(NamedTuple):
    """A decimal as written: value, significant digits, and the value of one unit in the last place."""

    value: Fraction
    significant: int
    unit: Fraction


def decimal_literal(node: Node) -> Decimal | None:
    r"""The decimal that the tree spells (`0.25`, `-1.5\times 10^{3}`), or None for anything else."""
    if node.op == "neg":
        inner = decimal_literal(node.args[0])
        return None if inner is None else Decimal(-inner.value, inner.significant, inner.unit)
    if node.op == "num" and node.value.decimals is not None:
        return Decimal(node.value.value, node.value.significant, Fraction(10) ** -node.value.decimals)
    if node.op == "mul" and len(node.args) == 2:
        mantissa, scale = decimal_literal(node.args[0]), power_of_ten(node.args[1])
        if mantissa is not None and scale is not None:
            return Decimal(mantissa.value * scale, mantissa.significant, mantissa.unit * scale)
    return None


def power_of_ten(node: Node) -> Fraction | None:
    """10^k as a value, for a literal k of moderate size."""
    if node.op != "pow" or node.args[0].op != "num" or node.args[0].value.value != 10:
        return None
    exponent, sign = node.args[1], 1
    if exponent.op == "neg":
        exponent, sign = exponent.args[0], -1
    if exponent.op != "num" or exponent.value.value.denominator != 1 or exponent.value.value > 400:
        return None
    return Fraction(10) ** (sign * int(exponent.value.value))


def scalar_equal(gold: Node, response: Node) -> bool:
    """Whether two scalar trees are the same expression in value."""
    for percent, radians in _readings(gold, response):
        if is_constant(gold) != is_constant(response) and not _same_names(gold, response):
            return False
        if is_constant(gold) and is_constant(response):
            if _constants_equal(gold, response, percent, radians):
                return True
        elif _functions_equal(gold, response, percent, radians):
            return True
    return False


def _same_names(gold: Node, response: Node) -> bool:
    """Cancelled variables are allowed (`x + 1 - x`), so only an answer with foreign names is ruled out early."""
    return not (contains(gold, "text") or contains(response, "text"))


def _readings(gold: Node, response: Node) -> Iterator[tuple[bool, bool]]:
    """(percent signs are ignored, degrees are radians): the readings under which both sides may be compared.

    A percent sign on one side only may be a matter of style (28 for 28 %) or of value (0.28); degrees likewise.
    """
    degrees = contains(gold, "deg") or contains(response, "deg")
    one_percent = contains(gold, "pct") != contains(response, "pct")
    for percent in (False, True) if one_percent else (False,):
        for radians in (False, True) if degrees else (False,):
            yield percent, radians


def _without_percent(node: Node) -> Node:
    if node.op == "pct":
        return node.args[0]
    return Node(node.op, tuple(_without_percent(a) for a in node.args), node.value)


def _constants_equal(gold: Node, response: Node, percent: bool, radians: bool) -> bool:
    if percent:
        gold, response = _without_percent(gold), _without_percent(response)
    infinite = {"infty"} & (symbols(gold) | symbols(response))
    if infinite:
        return _functions_equal(gold, response, False, radians)
    for digits in (QUICK_DIGITS, SURE_DIGITS):
        try:
            a = Evaluator(digits, radians=radians)(gold)
            b = Evaluator(digits, radians=radians)(response)
        except (UndecidedError, UndefinedError):
            return False
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return a == b or _approximate(gold, response, a, b)
        if not _close(a, b, digits):
            return _approximate(gold, response, a, b)
    return True


def _close(a: Value, b: Value, digits: int) -> bool:
    """Equal to within the working precision, with a margin for cancellation."""
    ctx = context(digits)
    a, b = _inexact(a, ctx), _inexact(b, ctx)
    margin = ctx.mpf(10) ** -(digits - max(10, digits // 6))
    return bool(abs(a - b) <= margin * max(1, abs(a), abs(b)))


def _inexact(value: Value, ctx: Any) -> Value:
    return ctx.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _approximate(gold: Node, response: Node, a: Value, b: Value) -> bool:
    """The rule for decimals in this module's docstring."""
    given, shown = decimal_literal(gold), decimal_literal(response)
    if (
        given is not None
        and shown is None
        and given.significant >= GOLD_DIGITS
        and given.value.denominator != 1
    ):
        tolerance = max(given.unit, abs(given.value) / 10**12)
    elif given is None and shown is not None and shown.significant >= RESPONSE_DIGITS and not _is_integer(a):
        tolerance = shown.unit
    else:
        return False
    ctx = context(QUICK_DIGITS)
    return bool(abs(_inexact(a, ctx) - _inexact(b, ctx)) <= _inexact(tolerance, ctx))


def _is_integer(value: Value) -> bool:
    return isinstance(value, Fraction) and value.denominator == 1


# -- expressions with variables --------------------------------------------------------------------------------------

_POSITIVE_TRIALS = 4
_SIGNED_TRIALS = 3
_LARGE_TRIAL = 3
_SURE_TRIALS = 2
_AGREEMENTS = 2


def _functions_equal(gold: Node, response: Node, percent: bool, radians: bool) -> bool:
    if percent:
        gold, response = _without_percent(gold), _without_percent(response)
    names = sorted((symbols(gold) | symbols(response)) - {"pi", "e", "i"})
    if len(names) > 40:
        return False
    has_imaginary = "i" in symbols(gold) | symbols(response)
    for real in (False,) if has_imaginary else (True, False):
        verdict = _agree(gold, response, names, real, radians)
        if verdict is not None:
            return verdict
    return False


def _agree(gold: Node, response: Node, names: list[str], real: bool, radians: bool) -> bool | None:
    """Whether the sides agree at every trial where both are defined; None if too few such trials exist."""
    agreements = 0
    trials = _POSITIVE_TRIALS + (_SIGNED_TRIALS if real else 0)
    for trial in range(trials):
        try:
            a, b = (_at(n, names, trial, real, radians, QUICK_DIGITS) for n in (gold, response))
        except UndefinedError:
            continue
        except UndecidedError:
            if trial == _LARGE_TRIAL:
                continue
            return False
        if not _close(a, b, QUICK_DIGITS):
            return False
        if trial < _SURE_TRIALS:
            try:
                a, b = (_at(n, names, trial, real, radians, POINT_DIGITS) for n in (gold, response))
            except (UndefinedError, UndecidedError):
                return False
            if not _close(a, b, POINT_DIGITS):
                return False
        agreements += 1
    return True if agreements >= _AGREEMENTS else None


def _at(node: Node, names: list[str], trial: int, real: bool, radians: bool, digits: int) -> Value:
    ctx = context(digits)
    point = {name: ctx.mpf(p) / q for name in names for p, q in (_coordinate(name, trial),)}
    return Evaluator(digits, point, real=real, radians=radians)(node)


def _coordinate(name: str, trial: int) -> tuple[int, int]:
    """A fixed rational for a variable and a trial: below 1, above 1, large (it tells floors apart), then signed."""
    digest = hashlib.blake2b(f"{trial}:{name}".encode(), digest_size=6).digest()
    draw = int.from_bytes(digest[:4], "big") % 7919
    numerator = 2003 + draw if trial % 2 == 0 else 11003 + 2 * draw
    if trial == _LARGE_TRIAL:
        numerator = 100_003 + 29 * draw
    sign = -1 if trial >= _POSITIVE_TRIALS and digest[5] % 2 else 1
    return sign * numerator, 10007


def factor_between(a: Node, b: Node) -> Fraction | None:
    """A rational c with a = c b, read off at one point; None if there is none of moderate size."""
    names = sorted((symbols(a) | symbols(b)) - {"pi", "e", "i"})
    try:
        x, y = (_at(n, names, 0, False, False, QUICK_DIGITS) for n in (a, b))
    except (UndecidedError, UndefinedError):
        return None
    ctx = context(QUICK_DIGITS)
    x, y = _inexact(x, ctx), _inexact(y, ctx)
    if y == 0 or isinstance(x / y, ctx.mpc):
        return None
    ratio = x / y
    if abs(ctx.mag(ratio)) > 60:
        return None
    scaled = Fraction(int(ctx.nint(ratio * 10**24)), 10**24).limit_denominator(10**6)
    return scaled if _close(ratio, scaled, 20) else None
