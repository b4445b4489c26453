r"""The final answer of a response without a box or tags.

Invariant: a rule of position, not of content. The answer is announced (`the answer is ...`), or is the last formula,
or the last number, of the last sentence that has one; at most three spans are returned, best first, and all of them
come from that one place, so a response cannot list candidates to have one of them match.
"""

from __future__ import annotations

import re

_TAIL_CHARS = 4000
_NOISE = re.compile(r"<\|[^|]{1,40}\|>.*|I hope it is correct\.?|</s>.*", re.DOTALL)
_ANNOUNCED = re.compile(
    r"(?:final answer|answer|réponse|respuesta|antwort|答案)\s*"
    r"(?:(?:is for sure|is for certain|is|est|es|ist|是|为)\b\s*[:：]?|[:：]|(?=[$\\\d-]))\s*",
    re.IGNORECASE,
)
_FORMULA = re.compile(
    r"\$\$([^$]+)\$\$|\$([^$]+?)\$|\\\(((?:(?!\\[(\[]).)+?)\\\)|\\\[((?:(?!\\[(\[]).)+?)\\\]", re.DOTALL
)
_NUMBER = re.compile(r"(?<![\w.,^_/])-?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:[.,]\d+)?(?:/\d+)?(?![\d^])\s*\\?%?")
_CHOICE = re.compile(r"^\W*\(?([A-J])\)?(?=[\s.,:;)。，不]|$)(?!\s*[=+*/^])")
_SENTENCE = re.compile(r"(?<=[.。!?])\s+|\n+|(?<=。)")


def final_answer(response: str) -> tuple[str, ...]:
    """Spans that may be the final answer, best first; empty if there is none."""
    text = _NOISE.sub("", response[-_TAIL_CHARS:]).replace("**", " ").strip()
    if "<think>" in text and "</think>" not in response:
        return ()
    text = _FORMULA.sub(lambda m: m.group().replace("\n", " "), text.rpartition("</think>")[2].strip())
    announced = list(_ANNOUNCED.finditer(text))
    if announced:
        found = _announced(text[announced[-1].end() :].strip())
        if found:
            return found
    return _from_sentences(text)


def _announced(rest: str) -> tuple[str, ...]:
    """Spans of what follows an announcement."""
    sentence = _SENTENCE.split(rest, maxsplit=1)[0].strip().rstrip(".。")
    if not sentence:
        return ()
    if choice := _CHOICE.match(sentence):
        return (choice.group(1),)
    formula = _FORMULA.match(rest)
    if formula:
        return (_inner(formula),)
    found = [sentence] if len(sentence) <= 80 else []
    number = _NUMBER.match(sentence)
    if number and (
        number.end() == len(sentence) or sentence[number.end() - 1 : number.end() + 1].strip() != ""
    ):
        found.append(number.group())
    elif not number:
        found += _last_in(sentence)
    return tuple(found[:3])


def _from_sentences(text: str) -> tuple[str, ...]:
    """Spans of the last sentence that holds a formula or a number."""
    if choice := _CHOICE.match(text):
        return (choice.group(1),)
    for sentence in reversed([s for s in _SENTENCE.split(text) if s and s.strip()]):
        found = _last_in(sentence)
        if found:
            return (*found[:2], text) if len(text) <= 120 else tuple(found[:2])
    return ()


def _last_in(sentence: str) -> list[str]:
    """The last formula of a sentence, else what follows its last equals sign, else its last number."""
    formulas = list(_FORMULA.finditer(sentence))
    tail = sentence[formulas[-1].end() :] if formulas else sentence
    numbers = list(_NUMBER.finditer(tail))
    if formulas and not numbers:
        percent = re.match(r"\s*(%|percent)", tail)
        return [_inner(formulas[-1]) + (r"\%" if percent else "")]
    return [numbers[-1].group()] if numbers else []


def _inner(match: re.Match[str]) -> str:
    return next(g for g in match.groups() if g is not None).strip()
