r"""Commands of LaTeX: fractions, roots, functions, matrices, finite sums.

Invariant: a command that is not in the vocabulary is a parse error.
"""

from __future__ import annotations

from ..nodes import Node, num
from .cursor import Cursor
from .lexer import ParseError, Token
from .literals import literal, literal_value, name_of, product_of
from .vocabulary import ALIASES, DECORATIONS, FUNCTION_COMMANDS, MATRICES, OPENING, SYMBOLS


class Commands(Cursor):
    """Rules for commands and their arguments."""

    def command(self, name: str) -> Node:
        name = ALIASES.get(name, name)
        if name == "frac":
            return Node("div", (self.tex_argument(), self.tex_argument()))
        if name in ("binom", "tbinom"):
            return Node("func", (self.tex_argument(), self.tex_argument()), "binom")
        if name == "sqrt":
            return self._root()
        if name in ("sum", "prod"):
            return self._big(name)
        if name.startswith("begin:"):
            return self._matrix(name[6:])
        if name in DECORATIONS:
            inner = self.argument()
            if inner.op not in ("sym", "mul", "text"):
                raise ParseError("a decoration on something that is no name")
            return Node("sym", (), f"{name}({name_of(inner)})")
        if name == "Gamma" and self.kind() == "(":
            return self._function(name)
        if name in FUNCTION_COMMANDS and name != "Gamma":
            return self._function(name)
        if name.startswith("mathbb:") or name in SYMBOLS:
            return self._named(name)
        raise ParseError(f"unknown command {name}")

    def _named(self, name: str) -> Node:
        if name == "emptyset":
            return Node("set", ())
        if name in ("angle", "triangle", "square") and self.starts_factor():
            return Node("sym", (), f"{name} {name_of(self.product())}")
        if name == "Delta" and self.kind() == "symbol":
            return Node("sym", (), f"Delta {self.take().text}")
        return Node("sym", (), name)

    def _root(self) -> Node:
        degree = num(2)
        if self.kind() == "[":
            self.at += 1
            degree = self.nested(self.sum)
            self.take("]")
        return Node("func", (self.argument(), degree), "root")

    def _big(self, name: str) -> Node:
        """A finite sum or product with its index, bounds and body."""
        self.take("_")
        self.take("{")
        index = self.take()
        self.take("=")
        lower = self.sum()
        self.take("}")
        self.take("^")
        upper = self.exponent()
        if index.kind != "symbol":
            raise ParseError("a sum without an index")
        return Node(name, (lower, upper, self.nested(self.product)), index.text)

    def _function(self, name: str) -> Node:
        """A named function with its power, base and arguments."""
        exponent: Node | None = None
        base: Node | None = None
        while self.kind() in ("^", "_"):
            if self.take().kind == "^":
                exponent = self.exponent()
            else:
                base = self.nested(self.tex_argument)
        arguments = self._arguments()
        if base is not None:
            arguments = (*arguments, base)
        if exponent is not None and literal_value(exponent) == -1 and not name.startswith("arc"):
            return Node("func", arguments, f"arc{name}")
        node = Node("func", arguments, ALIASES.get(name, name))
        return node if exponent is None else Node("pow", (node, exponent))

    def _arguments(self) -> tuple[Node, ...]:
        kind = self.kind()
        if kind in ("(", "[", "lgroup"):
            self.at += 1
            inner = self.bracketed(OPENING[kind])
            return inner.args if inner.op == "tuple" else (inner,)
        if kind == "{":
            return (self.argument(),)
        return (self.nested(self._bare_argument),)

    def _bare_argument(self) -> Node:
        r"""`\sin 2x` takes the product that follows, up to the next function or sign."""
        factors = [self.signed_power()]
        while True:
            kind = self.kind()
            if kind in FUNCTION_COMMANDS or kind in ("(", "[", "text") or not self.starts_factor():
                if kind == "/" and self.kind(1) == "number" and factors[-1].op in ("sym", "num"):
                    self.at += 1
                    return Node("div", (product_of(factors), self.power()))
                return product_of(factors)
            factors.append(self.implied(factors[-1]))

    def _matrix(self, environment: str) -> Node:
        if environment not in MATRICES:
            raise ParseError(f"environment {environment}")
        closing = f"end:{environment}"
        rows: list[list[Node]] = [[]]
        while self.kind() != closing:
            if self.peek() is None:
                raise ParseError("an unclosed environment")
            if self.kind() == "newline":
                self.at += 1
                rows.append([])
            elif self.kind() == "&":
                self.at += 1
            else:
                rows[-1].append(self.nested(self.sum))
        self.at += 1
        rows = [row for row in rows if row]
        if not rows or len({len(row) for row in rows}) != 1:
            raise ParseError("a ragged matrix")
        cells = tuple(x for row in rows for x in row)
        if environment == "vmatrix":
            return Node("func", cells, "det")
        return Node("matrix", cells, (len(rows), len(rows[0])))

    def argument(self) -> Node:
        """A brace group or one primary."""
        if self.kind() == "{":
            self.at += 1
            node = self.nested(self.sum)
            if self.kind() == "text":  # a unit or words behind it
                node = Node("qty", (node,), self.unit())
            self.take("}")
            return node
        return self.nested(self.primary)

    def tex_argument(self) -> Node:
        r"""As TeX reads it: of a bare number only the first digit (`\frac12`)."""
        token = self.peek()
        if token is not None and token.kind == "number" and len(token.text) > 1 and token.text.isdigit():
            self.tokens[self.at] = Token("number", token.text[1:], False)
            return num(int(token.text[0]))
        if token is not None and token.kind == "number":
            self.at += 1
            return Node("num", (), literal(token.text))
        return self.argument()
