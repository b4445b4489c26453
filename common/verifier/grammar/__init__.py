r"""LaTeX or plain mathematics becomes a tree (`nodes.Node`).

Invariant: recursive descent over a closed grammar. Nothing is evaluated and no name is looked up outside of
`vocabulary`, so nothing that a model writes can run.

Precedence, loosest first: separators, relations, set operations, sums, products (implicit ones included), sign,
powers. `\frac12` takes single digits as TeX does; `x^12` and `\sqrt12` take the whole number as people mean it.
One layer of rules per file: `structure` over `terms` over `primaries` over `commands` over `cursor`.
"""

from .lexer import ParseError
from .structure import parse_answer

__all__ = ["ParseError", "parse_answer"]
