"""Structure: lists, relations, unions, quantities; and the parser as a whole.

Invariant: `parse_answer` reads the whole answer or raises ParseError; no other error leaves it.
"""

from __future__ import annotations

from ..nodes import Node
from .lexer import Lexer, ParseError
from .terms import Terms
from .vocabulary import DISJUNCTIONS, RELATIONS

MAX_ITEMS = 300
MAX_RELATIONS = 30


class Parser(Terms):
    """Parses the tokens of one answer; use `parse_answer`."""

    def answer(self) -> Node:
        """The whole token list as one tree."""
        node = self.items(frozenset())
        if self.peek() is not None:
            raise ParseError("something is left over")
        return node

    def items(self, closers: frozenset[str]) -> Node:
        """Items between separators, up to a closer; a single item stands for itself."""
        found: list[Node] = []
        separators: list[str] = []
        while True:
            skipped = self._separators()
            if skipped and found:
                separators.append(skipped)
            if self.peek() is None or self.kind() in closers:
                break
            if found and not skipped:
                break
            found.append(self.relation())
            if len(found) > MAX_ITEMS:
                raise ParseError("too many items")
        if not found:
            raise ParseError("empty")
        if len(found) == 1 and not separators:
            return found[0]
        return Node("list", tuple(found), tuple(separators[: len(found)]))

    def _separators(self) -> str:
        """Skips separators; returns the strongest one seen: ';' over a word over ',' over space."""
        best = ""
        while True:
            kind = self.kind()
            if kind in ("lor", "connector"):
                word = self.take().text.casefold()
                best = best if best == ";" else "or" if word in DISJUNCTIONS or kind == "lor" else "and"
            elif kind in (",", ";"):
                self.at += 1
                best = kind if kind == ";" or not best else best
            elif kind == "quad":
                self.at += 1
                best = best or ","
            else:
                return best

    def relation(self) -> Node:
        """Operands joined by relations, each a set expression."""
        operators: list[str] = []
        operands: list[Node] = []
        if self.kind() in ("=", "approx"):
            self.at += 1  # a leading "=" continues an equation that began outside
        operands.append(self.operand())
        while self.kind() in RELATIONS:
            operators.append(RELATIONS[self.kind()])
            self.at += 1
            operands.append(self.operand())
            if len(operators) > MAX_RELATIONS:
                raise ParseError("too many relations")
        if not operators:
            return operands[0]
        return Node("rel", tuple(operands), tuple(operators))

    def operand(self) -> Node:
        """A set expression with an optional unit, an optional modulus or a clock's colon behind it."""
        left = self.sets()
        if self.kind() == ":":
            parts = [left]
            while self.kind() == ":":
                self.at += 1
                parts.append(self.sets())
            left = Node("tuple", tuple(parts), "::")
        if self.kind() == "pmod":
            self.at += 1
            left = Node("modulo", (left, self.argument()))
        if self.starts_unit():
            left = Node("qty", (left,), self.unit())
        return left

    def unit(self) -> str:
        """Unit words behind a quantity, with powers and quotients, as one string."""
        parts: list[str] = []
        while True:
            kind = self.kind()
            if kind == "text":
                parts.append(self.take().text)
            elif kind == "frac" and self.starts_unit():
                self.at += 1
                parts += [self._unit_group(), "/", self._unit_group()]
            elif kind == "^" and parts:
                self.at += 1
                exponent = self.argument()
                if exponent.op == "neg":
                    parts.append(
                        "^-" + str(exponent.args[0].value.value if exponent.args[0].op == "num" else "")
                    )
                elif exponent.op == "num":
                    parts.append(f"^{exponent.value.value}")
                else:
                    raise ParseError("a unit to an odd power")
            elif kind in ("/", "cdot", "*") and self.kind(1) == "text":
                self.at += 1
                parts.append("/" if kind == "/" else "*")
            else:
                return " ".join(parts)

    def _unit_group(self) -> str:
        """The words of one brace group of a quotient of units."""
        words: list[str] = []
        self.take("{")
        while self.kind() in ("text", "symbol"):
            words.append(self.take().text)
        self.take("}")
        return " ".join(words)

    def sets(self) -> Node:
        """Sums joined by union, intersection or difference."""
        left = self.sum()
        while (kind := self.kind()) in ("cup", "cap", "setminus", "backslash"):
            self.at += 1
            op = {"cup": "union", "cap": "inter"}.get(kind, "minus")
            right = self.sum()
            same = left.op == op and op != "minus"
            left = Node(op, (*left.args, right) if same else (left, right))
        return left


def parse_answer(source: str, *, grouping: bool = True, decimal_comma: bool = False) -> Node:
    """Parses a normalised answer.

    Raises:
        ParseError: it is not in the language; nothing else is raised.
    """
    try:
        return Parser(Lexer(source, grouping=grouping, decimal_comma=decimal_comma).run()).answer()
    except (RecursionError, OverflowError, ZeroDivisionError) as error:
        raise ParseError(type(error).__name__) from error
