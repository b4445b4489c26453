r"""Level `full`: a second opinion by Math-Verify, where the gold answer is outside of the own parser's language.

Invariant: it only ever adds `correct` verdicts for such gold answers, so hedges, brackets and units that the own rules
refuse stay refused (Math-Verify strips units and merges lists). Its alarms are switched off (they raise off the main
thread and do not interrupt big integers); instead the input is short and holds no power towers, factorials or words,
and in a pool the process itself is killed at the deadline. Only its LaTeX grammar is used: its plain-text path hands
text to `sympy.parse_expr`, which evaluates Python. It takes 10 to 1000 times as long as the own parser, so a response
that the own parser cannot read while it reads the gold answer is not worth the question: it is malformed.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .grade import Reading

MAX_CHARS = 128  # as in the paper's `is_latex_equal`
_UNSAFE = re.compile(
    r"[!`\"_]{2}|__|\^\s*\{?[^{}]*\^|\d{12}|!|\\(?:sum|prod|int|lim|binom|input|write)|\d[eE]\d|\*\*"
)
_WORDS = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}|\\(?:text|mathrm|mbox|lor|land|quad)|[;|]")
_STRUCTURE = re.compile(r"[(),\[\]]|\\[{}]|\\c[au]p|[<>=]|\\[lg]e|\\in\b|\\pm|\\begin|_")


def math_verify_equal(response: Reading, gold: Reading) -> bool:
    """Whether Math-Verify takes the two as equal; False where it must not be asked or fails."""
    if gold.trees or gold.words:
        return False
    if not (_askable(response.text) and _askable(gold.text)):
        return False
    if sorted(_STRUCTURE.findall(response.text)) != sorted(_STRUCTURE.findall(gold.text)):
        return False
    return _ask(response.text, gold.text)


def _askable(text: str) -> bool:
    return (
        0 < len(text) <= MAX_CHARS and text.isascii() and not _UNSAFE.search(text) and not _WORDS.search(text)
    )


@cache
def _library() -> tuple[Any, Any, Any]:
    """Math-Verify, imported on first use since it takes a second; its warnings about alarms are silenced."""
    import logging

    from math_verify import LatexExtractionConfig, parse, verify

    for name in ("math_verify.parser", "math_verify.grader", "math_verify.utils"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return parse, verify, LatexExtractionConfig


def _ask(response: str, gold: str) -> bool:
    parse, verify, latex = _library()
    options = {
        "extraction_config": [latex(boxed_match_priority=0)],
        "fallback_mode": "no_fallback",
        "extraction_mode": "first_match",
        "parsing_timeout": None,
    }
    try:
        theirs, mine = parse(f"${gold}$", **options), parse(f"${response}$", **options)
        return bool(theirs and mine and verify(theirs, mine, timeout_seconds=None))
    except Exception:  # a library failure is "not shown to be equal"
        return False
