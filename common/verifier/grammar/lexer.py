r"""Lexer: a normalised answer becomes a flat list of tokens.

Invariant: linear time in the length of the answer, and at most MAX_TOKENS tokens.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from .vocabulary import (
    CONNECTORS,
    FONT_COMMANDS,
    FUNCTIONS,
    PLAIN_NAMES,
    PREFIXES,
    SCALES,
    TEXT_COMMANDS,
    UNIT_WORDS,
)

MAX_TOKENS = 2500


class ParseError(ValueError):
    """The answer is not in the language that the parser knows."""


class Token(NamedTuple):
    """kind: number, command, word, text, symbol or a punctuation mark itself; text: its spelling."""

    kind: str
    text: str
    spaced: bool  # whether white space stood before it


_PREFIX = re.compile("|".join(PREFIXES))
_GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?(?!\d)")
_SPACED_THOUSANDS = re.compile(r"\d{1,3}(?: \d{3})+(?![\d.])")
_DECIMAL_COMMA = re.compile(r"\d+,\d+")
_NUMBER = re.compile(r"(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+(?![\w.]))?")
_COMMAND = re.compile(r"\\([a-zA-Z]+\*?|.)", re.DOTALL)
_WORD = re.compile(r"[^\W\d_]+")
_WORDY = re.compile(r"[^\W\d_]+(?:(?:[\s'./]+|-)[^\W\d_]+)*(?:\^?\d)?")

_UNIT_DOT = re.compile(r"(?<=[a-zA-Z])\s*\\(?:cdot|times)\s*(?=[a-zA-Z])")
_ABBREVIATION = re.compile(r"[^\W\d_](?:\.[^\W\d_])+\.?")


class Lexer:
    """Reads one normalised answer.

    Args:
        source: the normalised answer.
        grouping: whether `1,234` outside of brackets is one number (else a list of two).
        decimal_comma: whether `1,5` is one and a half.
    """

    def __init__(self, source: str, *, grouping: bool = True, decimal_comma: bool = False) -> None:
        self.source = source
        self.grouping = grouping
        self.decimal_comma = decimal_comma
        self.tokens: list[Token] = []
        self.depth = 0

    def run(self) -> list[Token]:
        """All tokens. Raises ParseError on an unknown character or too many tokens."""
        self._read(self.source, 0)
        return self.tokens

    def _emit(self, kind: str, text: str, spaced: bool) -> None:
        if len(self.tokens) >= MAX_TOKENS:
            raise ParseError("too many tokens")
        self.tokens.append(Token(kind, text, spaced))

    def _read(self, source: str, nesting: int) -> None:
        if nesting > 8:
            raise ParseError("text nested too deeply")
        position, end = 0, len(source)
        while position < end:
            spaced = False
            while position < end and source[position].isspace():
                position, spaced = position + 1, True
            if position == end:
                return
            position = self._one(source, position, spaced, nesting)

    def _one(self, source: str, position: int, spaced: bool, nesting: int) -> int:
        char = source[position]
        if char.isdigit() or (char == "." and source[position + 1 : position + 2].isdigit()):
            return self._number(source, position, spaced)
        if char == "\\":
            return self._command(source, position, spaced, nesting)
        if char.isalpha():
            return self._letters(source, position, spaced)
        if source.startswith("**", position):
            self._emit("^", "^", spaced)
            return position + 2
        for operator, name in (("<=", "le"), (">=", "ge"), ("!=", "ne"), ("==", "=")):
            if source.startswith(operator, position):
                self._emit("=" if name == "=" else "command", name, spaced)
                return position + 2
        if char not in "+-*/^_=<>()[]{}|,;:!'%&":
            raise ParseError(f"unexpected character {char!r}")
        self.depth += (char in "([{") - (char in ")]}")
        self._emit(char, char, spaced)
        return position + 1

    def _number(self, source: str, position: int, spaced: bool) -> int:
        match = None
        if self.depth == 0:
            if self.grouping:
                match = _GROUPED.match(source, position) or _SPACED_THOUSANDS.match(source, position)
            if match is None and self.decimal_comma:
                match = _DECIMAL_COMMA.match(source, position)
                if match:
                    self._emit("number", match.group().replace(",", "."), spaced)
                    return match.end()
        match = match or _NUMBER.match(source, position)
        if match is None or not match.group().isascii():
            raise ParseError("a digit that is no number")
        self._emit("number", match.group().replace(",", "").replace(" ", ""), spaced)
        return match.end()

    def _command(self, source: str, position: int, spaced: bool, nesting: int) -> int:
        match = _COMMAND.match(source, position)
        if match is None:
            raise ParseError("a backslash at the end")
        name, end = match.group(1), match.end()
        if name in TEXT_COMMANDS or name.startswith("operatorname"):
            content, end = _braced(source, end)
            self._text(content, name, spaced, nesting)
        elif name in FONT_COMMANDS:
            pass  # a font says nothing; its argument is read as a TeX group
        elif name == "\\":
            self._emit("newline", name, spaced)
        elif name in ("{", "}", "lbrace", "rbrace"):
            opening = name in ("{", "lbrace")
            self.depth += 1 if opening else -1
            self._emit("set{" if opening else "set}", name, spaced)
        elif name == "%":
            self._emit("%", "%", spaced)
        elif name == "|":
            self._emit("|", "|", spaced)
        elif name in ("begin", "end", "mathbb"):
            content, end = _braced(source, end)
            self._emit("command", f"{name}:{content.strip()}", spaced)
            if content.strip() == "array" and name == "begin":
                _, end = _braced(source, end)  # the column specification
        else:
            self._emit("command", name, spaced)
        return end

    def _text(self, content: str, name: str, spaced: bool, nesting: int) -> None:
        words = _UNIT_DOT.sub(" ", content).strip(" ,.;:\\")
        low = words.casefold()
        if not words:
            return
        if low in FUNCTIONS and not self._after_number(low):
            self._emit("command", low, spaced)
        elif low in ("inf", "infinity"):
            self._emit("command", "infty", spaced)
        elif low in CONNECTORS:
            self._emit("connector", low, spaced)
        elif len(words) == 1 and words.isalpha():
            follows = bool(self.tokens) and self.tokens[-1].kind in ("number", ")", "}", "symbol", "command")
            unit = (
                follows and words not in "eid" and self.tokens[-1].text not in ("cdot", "times", "frac", "in")
            )
            self._emit("text" if unit else "symbol", words, spaced)
        elif _WORDY.fullmatch(words):
            self._words(words, spaced)
        else:
            self._read(f" {content} ", nesting + 1)

    def _words(self, words: str, spaced: bool) -> None:
        """Words typed as text, split where a connector stands among them."""
        run: list[str] = []
        for word in words.split():
            if word.casefold().strip(",") in CONNECTORS:
                self._flush(run, spaced)
                self._emit("connector", word.strip(","), True)
                run = []
            else:
                run.append(word)
        self._flush(run, spaced)

    def _flush(self, run: list[str], spaced: bool) -> None:
        """Words as one token; a single letter stays a symbol."""
        if run:
            kind = "symbol" if len(run) == 1 and len(run[0]) == 1 else "text"
            self._emit(kind, " ".join(run), spaced)

    def _letters(self, source: str, position: int, spaced: bool) -> int:
        match = _WORD.match(source, position)
        assert match is not None
        run = match.group()
        low = run.casefold()
        if abbreviation := _ABBREVIATION.match(source, position):
            self._emit("text", abbreviation.group().rstrip("."), spaced)
            return abbreviation.end()
        if low in PLAIN_NAMES and not self._after_number(low):
            self._emit("command", low, spaced)
        elif low in CONNECTORS:
            self._emit("connector", low, spaced)
        elif self._is_unit(run, spaced):
            self._emit("text", run, spaced)
        elif (prefix := _PREFIX.match(run)) and len(run) > 2:
            self._emit("command", prefix.group(), spaced)
            return position + prefix.end()
        else:
            for k, letter in enumerate(run):
                self._emit("symbol", letter, spaced and k == 0)
        return match.end()

    def _after_number(self, name: str) -> bool:
        """`40 min` and `5 sec` are times, not functions."""
        return name in ("min", "sec") and bool(self.tokens) and self.tokens[-1].kind == "number"

    def _is_unit(self, run: str, spaced: bool) -> bool:
        low = run.casefold()
        if len(run) < 2 or not self.tokens:
            return len(run) > 3 and not run.isupper()
        if low in UNIT_WORDS or low in SCALES:
            return True
        return len(run) > 3 or (spaced and len(run) == 3 and self.tokens[-1].kind in ("number", "text"))


def _braced(source: str, position: int) -> tuple[str, int]:
    """Content of the brace group that starts at position (after spaces), and the position after it."""
    while position < len(source) and source[position] == " ":
        position += 1
    if position >= len(source) or source[position] != "{":
        raise ParseError("a command without its argument")
    depth = 0
    for k in range(position, len(source)):
        depth += (source[k] == "{") - (source[k] == "}")
        if depth == 0:
            return source[position + 1 : k], k + 1
    raise ParseError("an unclosed group")
