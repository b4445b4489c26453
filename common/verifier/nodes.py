"""The tree that an answer is parsed into.

Invariant: a tree is plain immutable data. Building or comparing one never runs anything the model wrote, and
`canonical` gives equal strings only to trees that differ by the order of terms, factors or set members.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple


class Node(NamedTuple):
    """One node: operator, children, and a payload whose meaning depends on the operator.

    Scalars: num (value = Literal), sym (name), text (words), add, mul, neg, div, pow, pm / mp (one child),
    func (name), apply (unknown function, name), mod, fact, deg, pct, base (digits, base), sum / prod (index name;
    lower, upper, body), matrix (value = (rows, columns)), det.
    Structures: list (value = separators), set, tuple (value = brackets), rel (value = operators), union, inter,
    minus, qty (value = unit).
    """

    op: str
    args: tuple[Node, ...] = ()
    value: Any = None


class Literal(NamedTuple):
    """A number as it was written: its exact value, and how many significant and decimal digits it shows."""

    value: Fraction
    significant: int = 0
    decimals: int | None = None  # None: an integer literal, hence exact


def num(value: int | Fraction) -> Node:
    """An exact number."""
    return Node("num", (), Literal(Fraction(value)))


_UNORDERED = frozenset({"add", "mul", "set", "union", "inter"})


def canonical(node: Node) -> str:
    """A string that identifies the tree up to the order of commutative children."""
    op, args, value = node
    if op == "num":
        return str(value.value)
    if op == "list" and len(args) == 1:
        return canonical(args[0])
    parts = [canonical(a) for a in args]
    if op in _UNORDERED or op == "list":
        parts.sort()
    payload = "" if value is None or op == "list" else repr(value)
    return f"{op}{payload}({','.join(parts)})"


def symbols(node: Node) -> set[str]:
    """Names of the free symbols; an index bound by a sum or product is not free."""
    if node.op == "sym":
        return {node.value}
    found: set[str] = set()
    for child in node.args:
        found |= symbols(child)
    if node.op in ("sum", "prod"):
        found.discard(node.value)
    return found


def contains(node: Node, *ops: str) -> bool:
    """Whether any node of the tree has one of these operators."""
    return node.op in ops or any(contains(a, *ops) for a in node.args)


CONSTANTS = frozenset({"pi", "e", "i", "infty"})


def is_constant(node: Node) -> bool:
    """Whether the tree is a scalar without free variables."""
    return not (symbols(node) - CONSTANTS) and not contains(
        node,
        "text",
        "list",
        "set",
        "tuple",
        "rel",
        "matrix",
        "apply",
        "base",
        "qty",
        "union",
        "inter",
        "minus",
    )
