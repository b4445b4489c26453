"""Arithmetic: sums, products written or implied, powers, indices.

Invariant: `-a mod b` is (-a) mod b, `-3\\frac12` is -(3 + 1/2), and two bare numbers in a row are no product.
"""

from __future__ import annotations

from ..nodes import Node, canonical, num
from .lexer import ParseError, Token
from .literals import product_of
from .primaries import Primaries
from .vocabulary import (
    ALIASES,
    DECORATIONS,
    FENCES,
    FUNCTION_COMMANDS,
    OPENING,
    PERCENT_WORDS,
    SCALES,
    SYMBOLS,
)

_STARTERS = frozenset({"number", "symbol", "text", "(", "[", "{", "set{"})


class Terms(Primaries):
    """Rules for arithmetic."""

    def sum(self) -> Node:
        """Terms joined by + - and plus-minus."""
        terms = [self.term()]
        while (kind := self.kind()) in ("+", "-", "pm", "mp"):
            self.at += 1
            term = self.term()
            terms.append(term if kind == "+" else Node({"-": "neg"}.get(kind, kind), (term,)))
        node = terms[0] if len(terms) == 1 else Node("add", tuple(terms))
        if self.kind() == "over":  # {a \\over b}
            self.at += 1
            return Node("div", (node, self.nested(self.sum)))
        return node

    def term(self) -> Node:
        """Factors joined by * / mod, written or implied."""
        signs: list[str] = []
        while (kind := self.kind()) in ("+", "-", "pm", "mp"):
            self.at += 1
            if kind != "+":
                signs.append({"-": "neg"}.get(kind, kind))
        node = self.product()
        if signs.count("neg") == len(signs):
            signs = ["neg"] * (len(signs) % 2)
        if len(signs) > 8:
            raise ParseError("too many signs")
        for sign in reversed(signs):
            if sign == "neg" and node.op == "mod":  # -a mod b is (-a) mod b
                node = Node("mod", (Node("neg", (node.args[0],)), node.args[1]))
            else:
                node = Node(sign, (node,))
        return node

    def product(self) -> Node:
        factors = [self.power()]
        while True:
            kind = self.kind()
            if kind in ("*", "cdot", "times"):
                self.at += 1
                factors.append(self.signed_power())
            elif kind in ("/", "div"):
                self.at += 1
                factors = [Node("div", (product_of(factors), self.signed_power()))]
            elif kind in ("mod", "bmod"):
                self.at += 1
                factors = [Node("mod", (product_of(factors), self.signed_power()))]
            elif kind == "choose":
                self.at += 1
                factors = [Node("func", (product_of(factors), self.power()), "binom")]
            elif self.starts_factor():
                factors.append(self.implied(factors[-1]))
            elif kind == "text" and self.peek().text.casefold() in SCALES:  # type: ignore[union-attr]
                factors.append(num(SCALES[self.take().text.casefold()]))
            else:
                return product_of(factors)

    def signed_power(self) -> Node:
        negative = False
        while self.kind() in ("+", "-"):
            negative ^= self.take().kind == "-"
        node = self.power()
        return Node("neg", (node,)) if negative else node

    def starts_factor(self) -> bool:
        """Whether the next token begins a factor of an implied product."""
        kind = self.kind()
        token = self.peek()
        if token is None or self.starts_unit():
            return False
        if kind in _STARTERS or kind in OPENING:
            return True
        if kind in ("|", "vert", "Vert"):
            return self.bars == 0
        return token.kind == "command" and self._is_primary_command(kind)

    def _is_primary_command(self, name: str) -> bool:
        return (
            name in FUNCTION_COMMANDS or name in SYMBOLS or name in ALIASES or name in FENCES
            or name in DECORATIONS or name in ("frac", "sqrt", "binom", "sum", "prod", "tbinom")
            or name.startswith(("begin:", "mathbb:"))
        )  # fmt: skip

    def implied(self, before: Node) -> Node:
        """A factor without an operator; two bare numbers in a row are not a product."""
        bare = before.op == "num" and self.kind() == "number"
        node = self.power()
        if bare and node.op != "add":  # a mixed number may follow a number
            raise ParseError("two numbers in a row")
        return node.args[0] if node.op == "set" and len(node.args) == 1 else node  # {1+2}{3-4}: brackets

    def power(self) -> Node:
        """A primary with everything attached to it: indices, powers, factorials, primes, degrees, percent."""
        node = self.nested(self.primary)
        while True:
            kind = self.kind()
            if kind == "_":
                self.at += 1
                node = self._indexed(node)
            elif kind == "^":
                self.at += 1
                node = self._raised(node)
            elif kind == "'":
                self.at += 1
                node = self._primed(node)
            elif kind == "!":
                self.at += 1
                if self.kind() == "!":
                    raise ParseError("a double factorial")
                node = Node("fact", (node,))
            elif kind in ("%", "degree"):
                self.at += 1
                node = Node("pct" if kind == "%" else "deg", (node,))
            elif kind == "text" and self.peek().text.casefold() in PERCENT_WORDS:  # type: ignore[union-attr]
                self.at += 1
                node = Node("pct", (node,))
            else:
                return node

    def _raised(self, node: Node) -> Node:
        if self.kind() == "{" and self.kind(1) in ("circ", "degree") and self.kind(2) == "}":
            self.at += 3
            return Node("deg", (node,))
        if self.kind() in ("circ", "degree"):
            self.at += 1
            return Node("deg", (node,))
        if self.kind() == "prime" or (self.kind() == "{" and self.kind(1) == "prime" and self.kind(2) == "}"):
            self.at += 1 if self.kind() == "prime" else 3
            return self._primed(node)
        exponent = self.exponent()
        if self.kind() == "_":  # x^2_0 is x_0^2
            self.at += 1
            node = self._indexed(node)
        return Node("pow", (node, exponent))

    def exponent(self) -> Node:
        """A group, or a signed primary; towers without braces nest to the right."""
        if self.kind() == "{":
            return self.argument()
        sign = self.kind() in ("+", "-") and self.take().kind == "-"
        node = self.nested(self.primary)
        if self.kind() == "^":
            self.at += 1
            node = Node("pow", (node, self.nested(self.exponent)))
        elif self.kind() == "!":
            self.at += 1
            node = Node("fact", (node,))
        return Node("neg", (node,)) if sign else node

    def _indexed(self, node: Node) -> Node:
        """A subscript: part of a symbol's name, or the base of a numeral."""
        index = self.index_text()
        if node.op == "sym":
            return Node("sym", (), f"{node.value}_{index}")
        if node.op == "num" and index.isdigit():
            return Node("base", (), (str(node.value.value), index))
        raise ParseError("an index on something that has none")

    def index_text(self) -> str:
        """Spelling of a subscript without fonts and spaces; sums and products inside it in canonical order."""
        if self.kind() != "{":
            token = self.take()
            if token.kind not in ("number", "symbol", "command", "text"):
                raise ParseError("a strange index")
            return token.text
        start, level = self.at, 0
        while True:
            token = self.take()
            level += (token.kind == "{") - (token.kind == "}")
            if level == 0:
                break
        return self._index_name(self.tokens[start + 1 : self.at - 1])

    def _index_name(self, tokens: list[Token]) -> str:
        """Canonical if the index is an expression (`F_{n-k}`), else as it is spelled."""
        spelled = "".join(token.text for token in tokens)
        inner = type(self)(list(tokens))
        inner.depth = self.depth + 1
        try:
            node = inner.sum()
        except ParseError:
            return spelled
        plain = inner.peek() is not None or node.op in ("sym", "num", "text", "mul")
        return spelled if plain else canonical(node)

    def _primed(self, node: Node) -> Node:
        if node.op not in ("sym", "apply"):
            raise ParseError("a prime on something that is no name")
        return Node(node.op, node.args, f"{node.value}'")
