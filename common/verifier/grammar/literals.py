"""Numbers and names as the parser builds them.

Invariant: a literal keeps both its exact value and how it was written.
"""

from __future__ import annotations

from fractions import Fraction

from ..nodes import Literal, Node
from .lexer import ParseError

MAX_NUMBER = 4200  # digits; Python itself refuses 4300
MAX_POWER = 4000  # of ten, in scientific notation


def product_of(factors: list[Node]) -> Node:
    return factors[0] if len(factors) == 1 else Node("mul", tuple(factors))


def literal(text: str) -> Literal:
    mantissa, _, exponent = text.lower().partition("e")
    if exponent and (len(exponent) > 6 or abs(int(exponent)) > MAX_POWER):
        raise ParseError("an exponent too large")
    digits = mantissa.replace(".", "").lstrip("0")
    decimals = len(mantissa.partition(".")[2]) if "." in mantissa else None
    if exponent:
        decimals = (decimals or 0) - int(exponent)
    elif mantissa.endswith("."):
        decimals = None  # "5." is the integer 5 at the end of a sentence
    value = Fraction(mantissa.rstrip(".") or "0") * (Fraction(10) ** int(exponent) if exponent else 1)
    return Literal(value, len(digits), decimals)


def literal_value(node: Node) -> Fraction | None:
    if node.op == "neg" and node.args[0].op == "num":
        return -node.args[0].value.value
    return node.value.value if node.op == "num" else None


def is_proper(fraction: Node) -> bool:
    above, below = (literal_value(a) if a.op == "num" else None for a in fraction.args)
    if above is None or below is None or above.denominator != 1 or below.denominator != 1:
        return False
    return 0 < above < below


def name_of(node: Node) -> str:
    """A readable name of a product of symbols (a segment, an angle)."""
    if node.op in ("sym", "text"):
        return str(node.value)
    if node.op == "mul" and all(a.op == "sym" for a in node.args):
        return "".join(str(a.value) for a in node.args)
    raise ParseError("not a name")
