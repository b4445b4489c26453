r"""Parser: LaTeX or plain mathematics becomes a tree (`nodes.Node`).

Invariant: recursive descent over a closed grammar. Nothing is evaluated and no name is looked up outside of the
tables in this package, so nothing that a model writes can run; nesting is bounded by MAX_DEPTH.

Precedence, loosest first: separators, relations, set operations, sums, products (implicit ones included), sign,
powers. `\frac12` takes single digits as TeX does; `x^12` and `\sqrt12` take the whole number as people mean it.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from .nodes import Literal, Node, num
from .tokens import CONNECTORS, FUNCTIONS, Lexer, ParseError, Token

MAX_DEPTH = 30
MAX_ITEMS = 300
MAX_NUMBER = 4200  # digits; Python itself refuses 4300

_RELATIONS = {
    "=": "=", "<": "<", ">": ">", "le": "<=", "ge": ">=", "ne": "!=", "approx": "~", "in": "in", "equiv": "==",
    "sim": "~", "simeq": "~", "cong": "==", "to": "to", "rightarrow": "to", "notin": "notin", "subset": "subset",
    "subseteq": "subseteq", "implies": "to", "Rightarrow": "to", "approxeq": "~", "propto": "propto",
    "parallel": "parallel", "perp": "perp",
}  # fmt: skip
_OPEN = {"(": "(", "[": "[", "lgroup": "(", "lbrack": "[", "lparen": "(", "langle": "<"}
_CLOSE = {")": ")", "]": "]", "rgroup": ")", "rbrack": "]", "rparen": ")", "rangle": ">"}
_FENCES = {
    "lfloor": ("rfloor", "floor"), "lceil": ("rceil", "ceil"), "ulcorner": ("urcorner", "ceil"),
    "llcorner": ("lrcorner", "floor"), "vert": ("vert", "abs"), "lvert": ("rvert", "abs"), "|": ("|", "abs"),
    "Vert": ("Vert", "norm"), "lVert": ("rVert", "norm"),
}  # fmt: skip
_ALIASES = {
    "tg": "tan", "ctg": "cot", "asin": "arcsin", "acos": "arccos", "atan": "arctan", "lb": "log", "infinity": "infty",
    "inf": "infty", "oo": "infty", "exponentialE": "e", "imaginaryI": "i", "varphi": "phi", "varepsilon": "epsilon",
    "vartheta": "theta", "O": "emptyset",
}  # fmt: skip
_DECORATIONS = frozenset(
    [
        "vec",
        "hat",
        "bar",
        "overline",
        "dot",
        "ddot",
        "tilde",
        "widehat",
        "widetilde",
        "overrightarrow",
        "overleftarrow",
        "underline",
        "check",
    ]
)
_SYMBOLS = frozenset(
    [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "zeta",
        "eta",
        "theta",
        "iota",
        "kappa",
        "lambda",
        "mu",
        "nu",
        "xi",
        "pi",
        "rho",
        "sigma",
        "tau",
        "upsilon",
        "phi",
        "chi",
        "psi",
        "omega",
        "Gamma",
        "Delta",
        "Theta",
        "Lambda",
        "Xi",
        "Pi",
        "Sigma",
        "Upsilon",
        "Phi",
        "Psi",
        "Omega",
        "infty",
        "hbar",
        "ell",
        "emptyset",
        "ldots",
        "e",
        "i",
        "partial",
        "nabla",
        "Re",
        "Im",
        "aleph",
        "odot",
        "oplus",
        "otimes",
        "star",
        "ast",
        "zzz",
        "imath",
        "jmath",
        "circ",
        "triangle",
        "square",
        "angle",
        "heartsuit",
        "spadesuit",
        "clubsuit",
        "diamondsuit",
        "prime",
        "dagger",
        "vdots",
        "lnot",
        "top",
        "bot",
        "wp",
        "Box",
        "Diamond",
        "sharp",
        "flat",
        "natural",
    ]
)
_FUNCTION_COMMANDS = frozenset(FUNCTIONS) | {"Gamma"}
_SEPARATORS = frozenset({",", ";", "connector"})
_STARTERS = frozenset({"number", "symbol", "text", "(", "[", "{", "set{"})


class Parser:
    """Parses one token list; use `parse_answer`."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.at = 0
        self.depth = 0
        self.bars = 0  # inside |...|, where a bar closes and never opens

    # -- token helpers ------------------------------------------------------------------------------------------

    def peek(self, ahead: int = 0) -> Token | None:
        k = self.at + ahead
        return self.tokens[k] if k < len(self.tokens) else None

    def kind(self, ahead: int = 0) -> str:
        """What the next token acts as: its kind, or for a command its name."""
        token = self.peek(ahead)
        if token is None:
            return ""
        return token.text if token.kind == "command" else token.kind

    def take(self, expected: str | None = None) -> Token:
        token = self.peek()
        if token is None or (expected is not None and self.kind() != expected):
            raise ParseError(f"expected {expected or 'more'}")
        self.at += 1
        return token

    def nested(self, rule: Callable[[], Node]) -> Node:
        """Runs a rule one level deeper."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ParseError("nested too deeply")
        try:
            return rule()
        finally:
            self.depth -= 1

    # -- structure ----------------------------------------------------------------------------------------------

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
            if kind == "lor" or (kind == "connector"):
                word = "or" if kind == "lor" else self.take_text()
                if kind == "lor":
                    self.at += 1
                best = best if best == ";" else word
            elif kind in (",", ";"):
                self.at += 1
                best = kind if kind == ";" or not best else best
            elif kind == "quad":
                self.at += 1
                best = best or ","
            else:
                return best

    def take_text(self) -> str:
        word = self.take().text.casefold().strip(",")
        return "or" if word in CONNECTORS and word in ("or", "oder", "ou") else "and"

    def relation(self) -> Node:
        """Operands joined by relations, each a set expression."""
        operators: list[str] = []
        operands: list[Node] = []
        if self.kind() in ("=", "approx"):
            self.at += 1  # a leading "=" continues an equation that began outside
        operands.append(self.operand())
        while self.kind() in _RELATIONS:
            operators.append(_RELATIONS[self.kind()])
            self.at += 1
            operands.append(self.operand())
            if len(operators) > 30:
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

    def starts_unit(self) -> bool:
        r"""Whether words follow, or a quotient of words such as `\frac{\text{km}}{\text{h}}`."""
        return self.kind() == "text" or (
            self.kind() == "frac" and self.kind(1) == "{" and self.kind(2) == "text"
        )

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

    # -- arithmetic ---------------------------------------------------------------------------------------------

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
                factors = [Node("div", (_product(factors), self.signed_power()))]
            elif kind in ("mod", "bmod"):
                self.at += 1
                factors = [Node("mod", (_product(factors), self.signed_power()))]
            elif kind == "choose":
                self.at += 1
                factors = [Node("func", (_product(factors), self.power()), "binom")]
            elif self.starts_factor():
                factors.append(self.implied(factors[-1]))
            elif kind == "text" and self.peek().text.casefold() in _SCALES:  # type: ignore[union-attr]
                factors.append(num(_SCALES[self.take().text.casefold()]))
            else:
                return _product(factors)

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
        if kind in _STARTERS or kind in _OPEN:
            return True
        if kind in ("|", "vert", "Vert"):
            return self.bars == 0
        return token.kind == "command" and self._is_primary_command(kind)

    def _is_primary_command(self, name: str) -> bool:
        return (
            name in _FUNCTION_COMMANDS or name in _SYMBOLS or name in _ALIASES or name in _FENCES
            or name in _DECORATIONS or name in ("frac", "sqrt", "binom", "sum", "prod", "tbinom")
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
            elif kind == "text" and self.peek().text.casefold() in _PERCENT_WORDS:  # type: ignore[union-attr]
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
        return _index_name(self.tokens[start + 1 : self.at - 1])

    def _primed(self, node: Node) -> Node:
        if node.op not in ("sym", "apply"):
            raise ParseError("a prime on something that is no name")
        return Node(node.op, node.args, f"{node.value}'")

    # -- primaries ----------------------------------------------------------------------------------------------

    def primary(self) -> Node:
        token = self.take()
        kind = token.text if token.kind == "command" else token.kind
        if kind == "number" and token.kind == "number":
            return self._number(token)
        if token.kind == "symbol":
            return self._symbol(token.text)
        if token.kind == "text":
            return self._words(token)
        if kind in _OPEN:
            return self._bracketed(_OPEN[kind])
        if kind == "{":
            return self._tex_group()
        if kind == "set{":
            return self._set()
        if kind in _FENCES:
            return self._fenced(kind)
        if token.kind == "command":
            return self._command(kind)
        raise ParseError(f"unexpected {kind}")

    def _number(self, token: Token) -> Node:
        text = token.text
        if len(text) > MAX_NUMBER:
            raise ParseError("a number too long")
        if (period := self._repeating(text)) is not None:
            return period
        value = _literal(text)
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
            and self.peek().spaced
            and self.kind(1) == "/"
            and self.kind(2) == "number"
        ):  # type: ignore[union-attr]
            above, below = self.tokens[self.at], self.tokens[self.at + 2]
            self.at += 3
            fraction = Node(
                "div", (Node("num", (), _literal(above.text)), Node("num", (), _literal(below.text)))
            )
        if fraction is not None and _is_proper(fraction):
            return Node("add", (whole, fraction))
        self.at = saved
        return whole

    def _symbol(self, name: str) -> Node:
        if name in "fgh" and self.kind() == "(" and self.peek(1) is not None:
            self.at += 1
            inner = self._bracketed("(")
            return Node("apply", inner.args if inner.op == "tuple" else (inner,), name)
        return Node("sym", (), name)

    def _words(self, token: Token) -> Node:
        words = [token.text]
        while self.kind() == "text":
            words.append(self.take().text)
        text = " ".join(" ".join(words).casefold().split())
        return Node("sym" if self.kind() in _RELATIONS or self.kind() == "(" else "text", (), text)

    def _bracketed(self, opening: str) -> Node:
        bars, self.bars = self.bars, 0
        closers = frozenset(_CLOSE)
        if self.kind() in closers:
            closing = _CLOSE[self.take_kind()]
            return Node("tuple", (), opening + closing)
        node = self.nested(lambda: self.items(closers))
        if self.kind() not in closers:
            raise ParseError("an unclosed bracket")
        closing = _CLOSE[self.take_kind()]
        self.bars = bars
        if node.op == "list":
            return Node("tuple", node.args, opening + closing)
        if opening + closing in ("()", "[]"):
            return node
        raise ParseError("brackets that do not match")

    def take_kind(self) -> str:
        kind = self.kind()
        self.at += 1
        return kind

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
        closing, function = _FENCES[opening]
        self.bars += 1
        node = self.nested(self.sum)
        self.take(closing)
        self.bars -= 1
        return Node("func", (node,), function)

    # -- commands -----------------------------------------------------------------------------------------------

    def _command(self, name: str) -> Node:
        name = _ALIASES.get(name, name)
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
        if name in _DECORATIONS:
            inner = self.argument()
            if inner.op not in ("sym", "mul", "text"):
                raise ParseError("a decoration on something that is no name")
            return Node("sym", (), f"{name}({_name_of(inner)})")
        if name == "Gamma" and self.kind() == "(":
            return self._function(name)
        if name in _FUNCTION_COMMANDS and name != "Gamma":
            return self._function(name)
        if name.startswith("mathbb:") or name in _SYMBOLS:
            return self._named(name)
        raise ParseError(f"unknown command {name}")

    def _named(self, name: str) -> Node:
        if name == "emptyset":
            return Node("set", ())
        if name in ("angle", "triangle", "square") and self.starts_factor():
            return Node("sym", (), f"{name} {_name_of(self.product())}")
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
        if exponent is not None and _literal_value(exponent) == -1 and not name.startswith("arc"):
            return Node("func", arguments, f"arc{name}")
        node = Node("func", arguments, _ALIASES.get(name, name))
        return node if exponent is None else Node("pow", (node, exponent))

    def _arguments(self) -> tuple[Node, ...]:
        kind = self.kind()
        if kind in ("(", "[", "lgroup"):
            self.at += 1
            inner = self._bracketed(_OPEN[kind])
            return inner.args if inner.op == "tuple" else (inner,)
        if kind == "{":
            return (self.argument(),)
        return (self.nested(self._bare_argument),)

    def _bare_argument(self) -> Node:
        r"""`\sin 2x` takes the product that follows, up to the next function or sign."""
        factors = [self.signed_power()]
        while True:
            kind = self.kind()
            if kind in _FUNCTION_COMMANDS or kind in ("(", "[", "text") or not self.starts_factor():
                if kind == "/" and self.kind(1) == "number" and factors[-1].op in ("sym", "num"):
                    self.at += 1
                    return Node("div", (_product(factors), self.power()))
                return _product(factors)
            factors.append(self.implied(factors[-1]))

    def _matrix(self, environment: str) -> Node:
        if environment not in ("pmatrix", "bmatrix", "matrix", "vmatrix", "array", "Bmatrix", "smallmatrix"):
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

    # -- arguments ----------------------------------------------------------------------------------------------

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
            return Node("num", (), _literal(token.text))
        return self.argument()


_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PERCENT_WORDS = frozenset({"percent", "pct", "percentage", "per cent", "percents"})


def _product(factors: list[Node]) -> Node:
    return factors[0] if len(factors) == 1 else Node("mul", tuple(factors))


def _literal(text: str) -> Literal:
    mantissa, _, exponent = text.lower().partition("e")
    if exponent and abs(int(exponent)) > 4000:
        raise ParseError("an exponent too large")
    digits = mantissa.replace(".", "").lstrip("0")
    decimals = len(mantissa.partition(".")[2]) if "." in mantissa else None
    if exponent:
        decimals = (decimals or 0) - int(exponent)
    elif mantissa.endswith("."):
        decimals = None  # "5." is the integer 5 at the end of a sentence
    value = Fraction(mantissa.rstrip(".") or "0") * (Fraction(10) ** int(exponent) if exponent else 1)
    return Literal(value, len(digits), decimals)


def _literal_value(node: Node) -> Fraction | None:
    if node.op == "neg" and node.args[0].op == "num":
        return -node.args[0].value.value
    return node.value.value if node.op == "num" else None


def _is_proper(fraction: Node) -> bool:
    above, below = (_literal_value(a) if a.op == "num" else None for a in fraction.args)
    if above is None or below is None or above.denominator != 1 or below.denominator != 1:
        return False
    return 0 < above < below


def _name_of(node: Node) -> str:
    """A readable name of a product of symbols (a segment, an angle)."""
    if node.op in ("sym", "text"):
        return str(node.value)
    if node.op == "mul" and all(a.op == "sym" for a in node.args):
        return "".join(str(a.value) for a in node.args)
    raise ParseError("not a name")


def _index_name(tokens: list[Token]) -> str:
    from .nodes import canonical

    try:
        node = Parser(list(tokens)).answer()
    except ParseError:
        return "".join(t.text for t in tokens)
    return "".join(t.text for t in tokens) if node.op in ("sym", "num", "text", "mul") else canonical(node)


def parse_answer(source: str, *, grouping: bool = True, decimal_comma: bool = False) -> Node:
    """Parses a normalised answer.

    Raises:
        ParseError: it is not in the language; nothing else is raised.
    """
    try:
        return Parser(Lexer(source, grouping=grouping, decimal_comma=decimal_comma).run()).answer()
    except (RecursionError, OverflowError, ZeroDivisionError) as error:
        raise ParseError(type(error).__name__) from error
