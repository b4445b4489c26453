"""Primaries: numbers, names, words and everything in brackets.

Invariant: brackets keep their kind, since a pair, an interval, a set and a group are different answers.
"""

from __future__ import annotations

from fractions import Fraction

from ..nodes import Node, num
from .commands import Commands
from .lexer import ParseError, Token
from .literals import MAX_NUMBER, is_proper, literal
from .vocabulary import CLOSING, FENCES, OPENING, RELATIONS


class Primaries(Commands):
    """Rules for primaries."""

    def primary(self) -> Node:
        token = self.take()
        kind = token.text if token.kind == "command" else token.kind
        if kind == "number" and token.kind == "number":
            return self._number(token)
        if token.kind == "symbol":
            return self._symbol(token.text)
        if token.kind == "text":
            return self._words(token)
        if kind in OPENING:
            return self.bracketed(OPENING[kind])
        if kind == "{":
            return self._tex_group()
        if kind == "set{":
            return self._set()
        if kind in FENCES:
            return self._fenced(kind)
        if token.kind == "command":
            return self.command(kind)
        raise ParseError(f"unexpected {kind}")

    def _number(self, token: Token) -> Node:
        text = token.text
        if len(text) > MAX_NUMBER:
            raise ParseError("a number too long")
        if (period := self._repeating(text)) is not None:
            return period
        value = literal(text)
        node = Node("num", (), value)
        return self._mixed(node) if value.decimals is None else node

    def _repeating(self, text: str) -> Node | None:
        r"""`0.1\overline{6}`: a repeating decimal, exactly."""
        if "." not in text or self.kind() not in ("overline", "bar", "dot") or "e" in text.lower():
            return None
        saved = self.at
        self.at += 1
        if self.kind() == "{" and self.kind(1) == "number" and self.kind(2) == "}":
            digits = self.tokens[self.at + 1].text
            if digits.isdigit():
                self.at += 3
                fixed = text.partition(".")[2]
                tail = Fraction(int(digits), (10 ** len(digits) - 1) * 10 ** len(fixed))
                return num(Fraction(text + "0" if text.endswith(".") else text) + tail)
        self.at = saved
        return None

    def _mixed(self, whole: Node) -> Node:
        r"""`3\frac12` and `3 1/2` are mixed numbers when the fraction is proper and made of plain integers."""
        saved = self.at
        fraction: Node | None = None
        if self.kind() == "frac":
            self.at += 1
            fraction = Node("div", (self.tex_argument(), self.tex_argument()))
        elif (
            self.kind() == "number"
            and self.peek().spaced  # type: ignore[union-attr]  # there is one: its kind is known
            and self.kind(1) == "/"
            and self.kind(2) == "number"
        ):
            above, below = self.tokens[self.at], self.tokens[self.at + 2]
            self.at += 3
            fraction = Node(
                "div", (Node("num", (), literal(above.text)), Node("num", (), literal(below.text)))
            )
        if fraction is not None and is_proper(fraction):
            return Node("add", (whole, fraction))
        self.at = saved
        return whole

    def _symbol(self, name: str) -> Node:
        if name in "fgh" and self.kind() == "(" and self.peek(1) is not None:
            self.at += 1
            inner = self.bracketed("(")
            return Node("apply", inner.args if inner.op == "tuple" else (inner,), name)
        return Node("sym", (), name)

    def _words(self, token: Token) -> Node:
        words = [token.text]
        while self.kind() == "text":
            words.append(self.take().text)
        text = " ".join(" ".join(words).casefold().split())
        return Node("sym" if self.kind() in RELATIONS or self.kind() == "(" else "text", (), text)

    def bracketed(self, opening: str) -> Node:
        bars, self.bars = self.bars, 0
        closers = frozenset(CLOSING)
        if self.kind() in closers:
            closing = CLOSING[self.take_kind()]
            return Node("tuple", (), opening + closing)
        node = self.nested(lambda: self.items(closers))
        if self.kind() not in closers:
            raise ParseError("an unclosed bracket")
        closing = CLOSING[self.take_kind()]
        self.bars = bars
        if node.op == "list":
            return Node("tuple", node.args, opening + closing)
        if opening + closing in ("()", "[]"):
            return node
        raise ParseError("brackets that do not match")

    def _tex_group(self) -> Node:
        node = self.nested(lambda: self.items(frozenset({"}"})))
        self.take("}")
        return Node("set", node.args) if node.op == "list" and len(node.args) > 1 else node

    def _set(self) -> Node:
        if self.kind() == "set}":
            self.at += 1
            return Node("set", ())
        if self.kind() == "symbol" and self.kind(1) in ("|", "mid", ":"):  # {x : x > 2} is its condition
            self.at += 2
            condition = self.nested(self.relation)
            self.take("set}")
            return condition
        node = self.nested(lambda: self.items(frozenset({"set}"})))
        self.take("set}")
        if node.op == "list":
            return Node("set", node.args)
        if self.kind() == "set{":  # braces used as brackets of a product
            return node
        return Node("set", (node,))

    def _fenced(self, opening: str) -> Node:
        closing, function = FENCES[opening]
        self.bars += 1
        node = self.nested(self.sum)
        self.take(closing)
        self.bars -= 1
        return Node("func", (node,), function)
