"""Words behind a quantity.

Invariant: only words typed as text, or plain words of several letters, ever reach this module; a single bare letter
stays a variable. Words that change the claim (`or`, `if`, `not`) are never dropped.
"""

from __future__ import annotations

import re

_CLAIMS = frozenset(
    ["if", "or", "and", "not", "when", "where", "unless", "otherwise", "else", "either", "neither", "except", "but", "wait", "for", "all", "is", "are", "then", "plus", "minus", "times"]
)  # fmt: skip
_SYNONYMS = {
    "centimeter": "cm", "centimetre": "cm", "meter": "m", "metre": "m", "kilometer": "km", "kilometre": "km",
    "millimeter": "mm", "millimetre": "mm", "inch": "in", "inche": "in", "feet": "ft", "foot": "ft", "mile": "mi",
    "yard": "yd", "hour": "h", "hr": "h", "minute": "min", "second": "s", "sec": "s", "kilogram": "kg", "gram": "g",
    "milligram": "mg", "pound": "lb", "ounce": "oz", "liter": "l", "litre": "l", "degree": "deg", "percentage": "percent",
    "pct": "percent", "dollar": "usd", "cent": "cents", "joule": "j", "newton": "n", "watt": "w", "square": "sq",
}  # fmt: skip
_WORD = re.compile(r"[^\W\d_]+")


def droppable(unit: str) -> bool:
    """Whether a quantity may be compared without these words."""
    return not (set(_WORD.findall(unit.casefold())) & _CLAIMS)


def same_unit(a: str, b: str) -> bool:
    """Whether two spellings name the same unit."""
    return _standard(a) == _standard(b)


def _standard(unit: str) -> str:
    text = unit.casefold().replace("per", "/").replace(".", "")
    text = _WORD.sub(lambda m: _word(m.group()), text)
    text = re.sub(r"sq\s*(\w+)", r"\1^2", text)
    return re.sub(r"[\s*~]+", "", text)


def _word(word: str) -> str:
    singular = word[:-1] if len(word) > 2 and word.endswith("s") and not word.endswith("ss") else word
    return _SYNONYMS.get(word) or _SYNONYMS.get(singular) or singular
