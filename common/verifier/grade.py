r"""Grades one response against its gold answer.

Invariant: a pure function of its arguments that never raises on any response. It runs in the caller's thread; only
the pool can stop it, although every step is bounded (see `normalise`, `grammar`, `evaluate`).

Where this grader deliberately differs from the paper's (section 4 of its digest):

| response | gold | paper, fast / full | here | why |
|---|---|---|---|---|
| 2/4 | 1/2 | wrong / correct | correct | equal numbers |
| 0.5 | 50\% | wrong / correct | correct | equal numbers |
| abc=5 | 5 | wrong / correct | correct | a name on the left is a name, whatever its length |
| 3+4, 2^3, 10^{2} | 7, 8, 100 | wrong / correct | correct | exact arithmetic is safe here |
| \{2,1\}; 2,1 | \{1,2\}; 1,2 | wrong / correct | correct | sets and lists have no order |
| 12 dollars | 12 | wrong | correct | a unit on one side only |
| 2 million | 2000000 | wrong | correct | a scale word is a factor |
| 5 or 6 | 5 | correct | wrong | hedging |
| \sqrt[3]{2}, 3^{n-1} | \sqrt{2}, 3^n-1 | correct | wrong | structure is kept |
| c+b | a+b | correct | wrong | variables are no units |
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from ..errors import UserError
from .compare import equal
from .extract import TAGGED, TEMPLATES, Extraction, Template, adjacent_boxes, extract, last_box
from .freeform import final_answer
from .full import math_verify_equal
from .grammar import ParseError, parse_answer
from .nodes import Node
from .normalise import MAX_CHARS, is_words, normalise, text_key
from .scalars import decimal_literal
from .verdict import Verdict, correct, unformatted, wrong

Level = Literal["fast", "full"]
LEVELS: tuple[Level, ...] = ("fast", "full")
Gold = str | int | float | list


def grade(
    response: str,
    gold: Gold,
    *,
    level: Level = "fast",
    template: Template = "boxed",
    allow_tag_whitespace: bool = False,
) -> Verdict:
    """Grades one response.

    Args:
        response: what the model wrote.
        gold: the gold answer, or a list of acceptable ones.
        level: `fast` (own string and value rules) or `full` (also ordered pairs without brackets and Math-Verify).
        template: where the answer must stand; see `extract`.
        allow_tag_whitespace: accept any white space between `</think>` and `<answer>`.

    Returns:
        correct, wrong or unformatted. It never raises on a response.

    Raises:
        UserError: the gold answer is of another type, or level or template is unknown.
    """
    golds = gold_texts(gold)
    check_options(level, template)
    found = extract(response, template, allow_tag_whitespace=allow_tag_whitespace)
    if found.answer is None:
        return unformatted(found.reason or "no answer")
    matched = any_match(answers_of(found, template, level), golds, level)
    return wrong(found.answer) if matched is None else correct(matched)


def answers_of(found: Extraction, template: Template, level: Level) -> tuple[str, ...]:
    """The extracted answer and its other readings; inside tags, prose is only searched at level `full`."""
    assert found.answer is not None
    return (found.answer, *(found.alternatives if template not in TAGGED or level == "full" else ()))


def any_match(answers: tuple[str, ...], golds: tuple[str, ...], level: Level) -> str | None:
    """The first reading that equals one of the gold answers, or None."""
    return next((a for a in answers if any(matches(a, g, level) for g in golds)), None)


def check_options(level: str, template: str) -> None:
    """Raises UserError for an unknown level or template."""
    if level not in LEVELS:
        raise UserError(f"unknown level {level!r}; one of {', '.join(LEVELS)}", setting="verifier.level")
    if template not in TEMPLATES:
        raise UserError(f"unknown template {template!r}; one of {', '.join(TEMPLATES)}", setting="template")


def gold_texts(gold: Gold) -> tuple[str, ...]:
    """The acceptable answers as strings. Raises UserError for any other type."""
    if isinstance(gold, list | tuple):
        return tuple(text for item in gold for text in gold_texts(item)) if len(gold) < 1000 else ()
    if isinstance(gold, bool) or not isinstance(gold, str | int | float):
        kind = type(gold).__name__
        raise UserError(f"a gold answer is a string, a number or a list of them, not {kind}", setting="gold")
    return (str(gold),)


@dataclass(frozen=True, slots=True)
class Reading:
    """One side of a comparison, prepared: its normal form, its words, and its trees by reading."""

    text: str
    key: str
    words: bool
    trees: tuple[tuple[str, Node], ...]


_GROUPED = re.compile(r"\d,\d{3}(?!\d)")
_DECIMAL_COMMA = re.compile(r"-?\d+,\d{2,}")


def _trees(text: str) -> tuple[tuple[str, Node], ...]:
    """Trees under every reading of a comma between digits: thousands, separator, decimal comma."""
    found: list[tuple[str, Node]] = []
    readings: list[tuple[str, dict[str, bool]]] = [("grouped", {})]
    if _GROUPED.search(text):
        readings.append(("list", {"grouping": False}))
    if _DECIMAL_COMMA.fullmatch(text):
        readings.append(("comma", {"grouping": False, "decimal_comma": True}))
    for name, options in readings:
        try:
            found.append((name, parse_answer(text, **options)))
        except ParseError:
            continue
    return tuple(found)


@lru_cache(maxsize=4096)
def read(answer: str) -> Reading | None:
    """Prepares one side; None if it is too long or binary."""
    try:
        text = normalise(answer)
    except ValueError:
        return None
    key = text_key(text)
    words = is_words(text, key)
    return Reading(text, key, words, _trees(text))


@lru_cache(maxsize=4096)
def gold_readings(gold: str) -> tuple[Reading, ...]:
    r"""Readings of a gold answer: the content of its boxes if it has any; a letter for `(D) Alina`."""
    texts = [gold]
    if "\\boxed" in gold:
        joined = adjacent_boxes(gold)
        texts = [joined[0] if joined else (last_box(gold) or gold)]
    if choice := _LABELLED.match(texts[0].rpartition("\n")[2]):
        texts.append(choice.group(1) or choice.group(2))
    elif "answer is" in gold and "\\boxed" not in gold:
        texts += final_answer(gold)
    return tuple(r for r in map(read, texts) if r is not None and r.text)


_LABELLED = re.compile(r"\s*(?:\\text\w*\{)?\s*(?:\(([A-J])\)|([A-J])[.):])\s*\S.*")
_INTEGER = re.compile(r"-?\d{1,400}", re.ASCII)


def obviously_equal(answer: str, gold: str) -> bool:
    """The same text, or the same integer."""
    mine, theirs = answer.strip(), gold.strip()
    if len(mine) > MAX_CHARS:
        return False
    return mine == theirs or bool(
        _INTEGER.fullmatch(mine) and _INTEGER.fullmatch(theirs) and int(mine) == int(theirs)
    )


def matches(answer: str, gold: str, level: Level) -> bool:
    """Whether an extracted answer equals one gold answer."""
    if obviously_equal(answer, gold):
        return True
    if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(gold):
        return False
    response = read(answer)
    if response is None or not response.text:
        return False
    return any(_same(response, g, level) for g in gold_readings(gold))


def _same(response: Reading, gold: Reading, level: Level) -> bool:
    """By spelling, then as words, then as trees, then (level `full`) by Math-Verify."""
    if response.text == gold.text:
        return True
    if response.words or gold.words:
        if response.key == gold.key:
            return True
        if response.words and gold.words:
            return False
    elif len(response.key) == 1 and response.key == gold.key and response.key.isalpha():
        return True
    if _trees_equal(response, gold, lenient=level == "full"):
        return True
    return level == "full" and math_verify_equal(response, gold)


def _trees_equal(response: Reading, gold: Reading, *, lenient: bool) -> bool:
    """Equal under the same reading of commas on both sides."""
    mine, theirs = dict(response.trees), dict(gold.trees)
    for name in {*mine, *theirs}:
        a, b = mine.get(name, mine.get("grouped")), theirs.get(name, theirs.get("grouped"))
        if name == "comma" and not all(n is not None and decimal_literal(n) for n in (a, b)):
            continue  # `-3,00` is -3.00 only against another decimal, else a list
        if a is not None and b is not None and equal(b, a, lenient=lenient):
            return True
    return False
