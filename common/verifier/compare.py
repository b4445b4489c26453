r"""Equality of two answers as trees.

Invariant: structure first. A list never equals one of its members, a pair never equals a set, brackets must match,
a unit on both sides must be the same unit; only then are scalars compared by value. So hedging between several
values is always wrong unless the gold answer lists the same values.
"""

from __future__ import annotations

from itertools import chain

from .intervals import same_subset, subset
from .nodes import CONSTANTS, Node, canonical, contains, is_constant, num, symbols
from .scalars import factor_between, scalar_equal
from .units import droppable, same_unit

_STRUCTURES = (
    "list",
    "set",
    "tuple",
    "rel",
    "union",
    "inter",
    "minus",
    "matrix",
    "modulo",
    "base",
    "text",
    "qty",
)


def equal(gold: Node, response: Node, *, lenient: bool = False) -> bool:
    """Whether the response's tree is the gold answer.

    Args:
        gold: tree of the gold answer.
        response: tree of the extracted answer.
        lenient: level `full`: also `1,2` for the ordered pair `(1,2)` and the reverse.
    """
    gold, response = _reduce(gold), _reduce(response)
    if canonical(gold) == canonical(response):
        return True
    if "qty" in (gold.op, response.op):
        return _quantities(gold, response, lenient)
    if "rel" in (gold.op, response.op):
        return _relations(gold, response, lenient)
    several = _collections(gold, response, lenient)
    if several is not None:
        return several
    if gold.op == response.op == "tuple":
        same = gold.value == response.value and len(gold.args) == len(response.args)
        return same and _ordered(gold.args, response.args, lenient)
    if (line := _subsets(gold, response)) is not None:
        return line
    if gold.op == response.op == "matrix":
        return gold.value == response.value and _ordered(gold.args, response.args, lenient)
    if gold.op == response.op and gold.op in ("union", "inter"):
        return _matching(gold.args, response.args, lenient)
    if gold.op == response.op == "minus":
        return _ordered(gold.args, response.args, lenient)
    if gold.op in _STRUCTURES or response.op in _STRUCTURES:
        return False
    if contains(gold, *_STRUCTURES) or contains(response, *_STRUCTURES):
        return False
    return scalar_equal(gold, response)


def _ordered(gold: tuple[Node, ...], response: tuple[Node, ...], lenient: bool) -> bool:
    return len(gold) == len(response) and all(
        equal(g, r, lenient=lenient) for g, r in zip(gold, response, strict=True)
    )


def _matching(gold: tuple[Node, ...], response: tuple[Node, ...], lenient: bool) -> bool:
    """Equal as multisets: a one-to-one assignment, greedy since equality of answers is transitive."""
    if len(gold) != len(response):
        return False
    rest = list(response)
    for g in gold:
        k = next((k for k, r in enumerate(rest) if equal(g, r, lenient=lenient)), None)
        if k is None:
            return False
        del rest[k]
    return True


# -- quantities ------------------------------------------------------------------------------------------------------


def _quantities(gold: Node, response: Node, lenient: bool) -> bool:
    """A unit on one side only is dropped; on both sides it must be the same one."""
    if gold.op == response.op == "qty":
        return same_unit(gold.value, response.value) and equal(
            gold.args[0], response.args[0], lenient=lenient
        )
    quantity, other = (gold, response) if gold.op == "qty" else (response, gold)
    if not droppable(quantity.value):
        return False
    bare = quantity.args[0]
    return equal(bare, other, lenient=lenient) if gold.op == "qty" else equal(other, bare, lenient=lenient)


# -- several values --------------------------------------------------------------------------------------------------


def _collections(gold: Node, response: Node, lenient: bool) -> bool | None:
    """Lists and sets against lists, sets and tuples; None where neither side is one."""
    gold_items, response_items = _expanded(gold), _expanded(response)
    if gold_items is None and response_items is None:
        return None
    if gold_items is not None and response_items is not None:
        return _lists(gold_items, response_items, lenient)
    items, other = (gold_items, response) if gold_items is not None else (response_items, gold)
    line, other_line = subset(Node("set", items or ())) if items else None, subset(other)
    if line is not None and other_line is not None and other.op in ("union", "inter", "minus"):
        return same_subset(line, other_line)
    if _is_union_of_relations(gold) or _is_union_of_relations(response):
        return bool(_subsets(gold, response))
    named = items is not None and all(a.op == "rel" for a in items)
    if other.op == "tuple" and other.value in ("()", "::") and (lenient or named):
        plain = not contains(gold if gold_items is not None else response, "set")
        return plain and _ordered(tuple(_value(a) for a in items or ()), other.args, lenient)
    return False


def _is_union_of_relations(node: Node) -> bool:
    return node.op == "list" and all(a.op == "rel" and not _is_assignment(a) for a in node.args)


def _lists(gold: tuple[Node, ...], response: tuple[Node, ...], lenient: bool) -> bool:
    named = [all(_is_assignment(a) for a in side) for side in (gold, response)]
    if named[0] != named[1]:  # names on one side only: their order decides, unless all are the same name
        names = {canonical(a.args[0]) for a in (gold if named[0] else response)}
        values = tuple(_value(a) for a in gold), tuple(_value(a) for a in response)
        return _ordered(*values, lenient) if len(names) > 1 else _matching(*values, lenient)
    return _matching(gold, response, lenient)


def _expanded(node: Node) -> tuple[Node, ...] | None:
    """Members of a list or set with plus-minus written out; None for a single value."""
    if node.op == "list":
        return tuple(chain.from_iterable(_expanded(a) or (a,) for a in _grouped(node)))
    if node.op == "set":
        return tuple(chain.from_iterable(_signs(a) for a in node.args))
    signs = _signs(node)
    return signs if len(signs) > 1 else None


def _signs(node: Node) -> tuple[Node, ...]:
    if not contains(node, "pm", "mp"):
        return (node,)
    return _signed(node, "pm"), _signed(node, "mp")


def _signed(node: Node, negative: str) -> Node:
    """The tree with every plus-minus replaced by one sign."""
    args = tuple(_signed(a, negative) for a in node.args)
    if node.op in ("pm", "mp"):
        return Node("neg", args) if node.op == negative else args[0]
    return Node(node.op, args, node.value)


def _grouped(node: Node) -> tuple[Node, ...]:
    """`p=5,q=2;p=7,q=2` is a list of pairs: semicolons bind looser than commas."""
    if not {",", ";"} <= set(node.value or ()):
        return node.args
    groups: list[list[Node]] = [[node.args[0]]]
    for separator, item in zip(node.value, node.args[1:], strict=False):
        if separator == ";":
            groups.append([item])
        else:
            groups[-1].append(item)
    return tuple(Node("tuple", tuple(_value(a) for a in g), "()") if len(g) > 1 else g[0] for g in groups)


# -- relations -------------------------------------------------------------------------------------------------------


def _relations(gold: Node, response: Node, lenient: bool) -> bool:
    if gold.op == response.op == "rel":
        return _both_relations(gold, response, lenient)
    if (line := _subsets(gold, response)) is not None:
        return line
    relation, other = (gold, response) if gold.op == "rel" else (response, gold)
    value = _value(relation)
    if value is relation:
        return False
    return equal(value, other, lenient=lenient) if gold.op == "rel" else equal(other, value, lenient=lenient)


def _both_relations(gold: Node, response: Node, lenient: bool) -> bool:
    if _is_assignment(gold) and _is_assignment(response):
        if _same_name(gold.args[0], response.args[0]):
            return equal(_value(gold), _value(response), lenient=lenient)
        if gold.args[0].op == response.args[0].op == "sym" and not contains(gold, "add", "mul", "pow", "sym"):
            return False
    if (line := _subsets(gold, response)) is not None:
        return line
    if len(gold.args) == len(response.args) == 2:
        return _two_sided(gold, response, lenient)
    return False


def _same_name(a: Node, b: Node) -> bool:
    return canonical(a) == canonical(b)


_MIRROR = {"=": "=", "!=": "!=", "==": "==", "~": "~", "<": ">", ">": "<", "<=": ">=", ">=": "<="}


def _two_sided(gold: Node, response: Node, lenient: bool) -> bool:
    """The same relation: sides equal, mirrored, or differing by a constant factor."""
    (g,), (r,) = gold.value, response.value
    if g == r and _ordered(gold.args, response.args, lenient):
        return True
    if _MIRROR.get(r) == g and _ordered(gold.args, response.args[::-1], lenient):
        return True
    if g not in _MIRROR or any(contains(n, *_STRUCTURES) for n in (*gold.args, *response.args)):
        return False
    if r not in (g, _MIRROR[g]) or symbols(gold) - CONSTANTS != symbols(response) - CONSTANTS:
        return False
    left, right = _difference(gold), _difference(response)
    if r != g:
        right = Node("neg", (right,))
    return _proportional(left, right, signed=g not in ("=", "!="))


def _difference(relation: Node) -> Node:
    return Node("add", (relation.args[0], Node("neg", (relation.args[1],))))


def _proportional(a: Node, b: Node, *, signed: bool) -> bool:
    """Whether a = c b for a constant c other than 0 (positive if signed), probed at two points."""
    factor = factor_between(a, b)
    if factor is None or factor == 0 or (signed and factor < 0):
        return False
    if is_constant(a) and is_constant(b):
        return False
    return scalar_equal(a, Node("mul", (num(factor), b)))


def _is_assignment(node: Node) -> bool:
    return node.op == "rel" and _value(node) is not node


def _value(node: Node) -> Node:
    r"""What an equation assigns (`x = 5`, `P(A) = \frac13 \approx 0.33`, `\sqrt4 = 2`); else the tree itself."""
    if node.op != "rel":
        return node
    if node.value == ("in",) and _is_name(node.args[0]):
        return node.args[1]
    if set(node.value) - {"=", "~"}:
        return node
    exact = node.args[: node.value.index("~") + 1] if "~" in node.value else node.args
    left, right = exact[0], exact[-1]
    if len(exact) == 1:  # only approximations follow: a name takes the first of them
        return node.args[1] if _is_name(left) else left
    if _is_name(left) and not (_is_name(right) and _same_name(left, right)):
        return right
    if is_constant(left):
        if len(exact) > 2 or (is_constant(right) and scalar_equal(left, right)):
            return right
        return left if _is_name(right) else node
    return node


def _is_name(node: Node) -> bool:
    """Whether a left-hand side only names what follows: a symbol, f(x), a pair of names, NO/BO; never a sum."""
    if node.op == "sym":
        return node.value not in CONSTANTS
    if node.op in ("text", "apply"):
        return True
    if node.op == "func" and node.value not in ("root", "det"):
        return not is_constant(node)
    if node.op in ("tuple", "list"):
        return bool(node.args) and all(_is_name(a) for a in node.args)
    if node.op == "mul":  # P(A), P(X = 1), S(5)
        return node.args[0].op == "sym" and (len(node.args) == 2 or all(_is_name(a) for a in node.args))
    return node.op == "div" and all(_is_name(a) for a in node.args)


# -- the rest --------------------------------------------------------------------------------------------------------


def _subsets(gold: Node, response: Node) -> bool | None:
    """As subsets of the real line, where at least one side is unmistakably one; None where they are not both."""
    sure = ("union", "inter", "minus", "rel", "list")
    if gold.op not in sure and response.op not in sure and "mathbb:R" not in (gold.value, response.value):
        return None
    a, b = subset(gold), subset(response)
    return None if a is None or b is None else same_subset(a, b)


def _reduce(node: Node) -> Node:
    """Matrix arithmetic carried out, so that a sum of matrices is a matrix."""
    if node.op in ("add", "mul", "neg") and contains(node, "matrix"):
        return _matrix(node)
    return node


def _matrix(node: Node) -> Node:
    args = tuple(_reduce(a) for a in node.args)
    if node.op == "neg" and args[0].op == "matrix":
        return Node("matrix", tuple(Node("neg", (a,)) for a in args[0].args), args[0].value)
    if node.op == "add" and all(a.op == "matrix" and a.value == args[0].value for a in args):
        return Node(
            "matrix",
            tuple(Node("add", cells) for cells in zip(*(a.args for a in args), strict=True)),
            args[0].value,
        )
    if node.op == "mul" and len(args) == 2 and args[1].op == "matrix" and args[0].op != "matrix":
        return Node("matrix", tuple(Node("mul", (args[0], cell)) for cell in args[1].args), args[1].value)
    return node
