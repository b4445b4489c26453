r"""Subsets of the real line that answers describe: intervals, unions, inequalities, finite sets of numbers.

Invariant: a subset is a sorted tuple of disjoint pieces that do not touch, so two answers describe the same subset
if and only if their pieces are the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .evaluate import Evaluator, UndecidedError, UndefinedError, context
from .nodes import Node, is_constant

DIGITS = 40
_INFINITY = Node("sym", (), "infty")


class Piece(NamedTuple):
    """An interval; a single number has equal closed ends. Ends are numbers of 40 digits."""

    low: Any
    low_closed: bool
    high: Any
    high_closed: bool


class NotASubsetError(ValueError):
    """The tree describes no subset with numeric ends."""


Subset = tuple[Piece, ...]


def subset(node: Node) -> Subset | None:
    """The subset of the reals that the tree describes, or None."""
    try:
        return _merge(_pieces(node))
    except (NotASubsetError, UndecidedError, UndefinedError):
        return None


def same_subset(a: Subset, b: Subset) -> bool:
    """Whether two subsets are equal, ends to 30 digits."""
    return len(a) == len(b) and all(
        x.low_closed == y.low_closed
        and x.high_closed == y.high_closed
        and _same(x.low, y.low)
        and _same(x.high, y.high)
        for x, y in zip(a, b, strict=True)
    )


def _same(x: Any, y: Any) -> bool:
    if x == y:
        return True
    ctx = context(DIGITS)
    return bool(ctx.isfinite(x) and ctx.isfinite(y) and abs(x - y) <= ctx.mpf(10) ** -30 * max(1, abs(x)))


def _end(node: Node) -> Any:
    ctx = context(DIGITS)
    if node == _INFINITY:
        return ctx.inf
    if node == Node("neg", (_INFINITY,)):
        return -ctx.inf
    if not is_constant(node):
        raise NotASubsetError
    evaluate = Evaluator(DIGITS, real=True)
    return evaluate.inexact(evaluate(node))


def _piece(low: Any, low_closed: bool, high: Any, high_closed: bool) -> list[Piece]:
    ctx = context(DIGITS)
    low_closed, high_closed = low_closed and low != -ctx.inf, high_closed and high != ctx.inf
    if low > high or (_same(low, high) and not (low_closed and high_closed)):
        return []
    return [Piece(low, low_closed, high, high_closed)]


def _pieces(node: Node) -> list[Piece]:
    ctx = context(DIGITS)
    if node.op == "tuple" and len(node.args) == 2 and node.value in ("()", "[]", "(]", "[)"):
        low, high = (_end(a) for a in node.args)
        if low > high:
            raise NotASubsetError
        return _piece(low, node.value[0] == "[", high, node.value[1] == "]")
    if node.op == "set":
        return [Piece(x, True, x, True) for x in (_end(a) for a in node.args)]
    if node == Node("sym", (), "mathbb:R"):
        return _piece(-ctx.inf, False, ctx.inf, False)
    if node.op == "rel":
        return _relation(node)
    if node.op == "union" or (node.op == "list" and node.value and set(node.value) == {"or"}):
        return [piece for a in node.args for piece in _pieces(a)]
    if node.op == "inter":
        found = _merge(_pieces(node.args[0]))
        for a in node.args[1:]:
            found = _intersection(found, _merge(_pieces(a)))
        return list(found)
    if node.op == "minus":
        return list(_intersection(_merge(_pieces(node.args[0])), _complement(_merge(_pieces(node.args[1])))))
    raise NotASubsetError


_FLIP = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}


def _relation(node: Node) -> list[Piece]:
    """`x \\in S`, `x > a`, `a < x <= b`, and the same for |x|."""
    operators, operands = node.value, node.args
    if operators == ("in",):
        return _pieces(operands[1])
    found: Subset | None = None
    middle = [k for k, operand in enumerate(operands) if not is_constant(operand)]
    if len(middle) != 1 or len(operands) not in (2, 3):
        raise NotASubsetError
    k = middle[0]
    sides = [(operators[k], operands[k + 1])] if k + 1 < len(operands) else []
    if k > 0:
        sides.append((_FLIP.get(operators[k - 1], ""), operands[k - 1]))
    for operator, bound in sides:
        part = _merge(_half_line(operator, _end(bound), operands[k]))
        found = part if found is None else _intersection(found, part)
    return list(found or ())


def _half_line(operator: str, bound: Any, subject: Node) -> list[Piece]:
    ctx = context(DIGITS)
    absolute = subject.op == "func" and subject.value == "abs" and subject.args[0].op == "sym"
    if not absolute and subject.op not in ("sym", "apply"):
        raise NotASubsetError
    closed = operator in ("<=", ">=")
    if operator in ("<", "<="):
        return _piece(-bound if absolute else -ctx.inf, closed and absolute, bound, closed)
    if operator in (">", ">="):
        right = _piece(bound, closed, ctx.inf, False)
        return right + (_piece(-ctx.inf, False, -bound, closed) if absolute else [])
    if operator == "!=" and not absolute:
        return _piece(-ctx.inf, False, bound, False) + _piece(bound, False, ctx.inf, False)
    raise NotASubsetError


def _merge(pieces: list[Piece]) -> Subset:
    """Sorted, with overlapping and touching pieces joined."""
    done: list[Piece] = []
    for piece in sorted(pieces, key=lambda p: (p.low, not p.low_closed)):
        last = done[-1] if done else None
        if last is None or not _joins(last, piece):
            done.append(piece)
        elif _same(piece.high, last.high):
            done[-1] = last._replace(high_closed=last.high_closed or piece.high_closed)
        elif piece.high > last.high:
            done[-1] = last._replace(high=piece.high, high_closed=piece.high_closed)
    return tuple(done)


def _joins(a: Piece, b: Piece) -> bool:
    return b.low < a.high or (_same(a.high, b.low) and (a.high_closed or b.low_closed))


def _complement(pieces: Subset) -> Subset:
    ctx = context(DIGITS)
    found: list[Piece] = []
    low, closed = -ctx.inf, False
    for piece in pieces:
        found += _piece(low, closed, piece.low, not piece.low_closed)
        low, closed = piece.high, not piece.high_closed
    return tuple(found + _piece(low, closed, ctx.inf, False))


def _intersection(a: Subset, b: Subset) -> Subset:
    found: list[Piece] = []
    for x in a:
        for y in b:
            low, low_closed = max((x.low, not x.low_closed), (y.low, not y.low_closed))
            high, high_closed = min((x.high, x.high_closed), (y.high, y.high_closed))
            found += _piece(low, not low_closed, high, high_closed)
    return _merge(found)
