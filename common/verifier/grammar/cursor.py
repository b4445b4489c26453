"""Where the parser stands in its tokens.

Invariant: rules only move forward, except to a place they saved themselves; nesting is bounded by MAX_DEPTH.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from ..nodes import Node
from .lexer import ParseError, Token

MAX_DEPTH = 30


class Cursor(ABC):
    """Token helpers, and the rules that the layers of the parser call in one another.

    Args:
        tokens: of one answer; rules may rewrite them (`\\frac12` splits a number).
    """

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.at = 0
        self.depth = 0
        self.bars = 0  # inside |...|, where a bar closes and never opens

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

    def take_kind(self) -> str:
        kind = self.kind()
        self.at += 1
        return kind

    def starts_unit(self) -> bool:
        r"""Whether words follow, or a quotient of words such as `\frac{\text{km}}{\text{h}}`."""
        return self.kind() == "text" or (
            self.kind() == "frac" and self.kind(1) == "{" and self.kind(2) == "text"
        )

    @abstractmethod
    def items(self, closers: frozenset[str]) -> Node:
        """Items between separators."""

    @abstractmethod
    def relation(self) -> Node:
        """Operands joined by relations."""

    @abstractmethod
    def unit(self) -> str:
        """Unit words behind a quantity."""

    @abstractmethod
    def sum(self) -> Node:
        """Terms joined by signs."""

    @abstractmethod
    def product(self) -> Node:
        """Factors joined by operators or by nothing."""

    @abstractmethod
    def signed_power(self) -> Node:
        """A power with an optional sign."""

    @abstractmethod
    def power(self) -> Node:
        """A primary with everything attached to it."""

    @abstractmethod
    def exponent(self) -> Node:
        """What stands behind a caret."""

    @abstractmethod
    def implied(self, before: Node) -> Node:
        """The next factor of an implied product."""

    @abstractmethod
    def starts_factor(self) -> bool:
        """Whether the next token begins a factor."""

    @abstractmethod
    def primary(self) -> Node:
        """A number, name, bracket or command."""

    @abstractmethod
    def bracketed(self, opening: str) -> Node:
        """What stands behind an opening bracket."""
