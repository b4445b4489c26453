r"""Where the answer stands in a response.

Invariant: extraction is linear in the length of the response and decides `formatted` by exact rules.

`boxed` (the paper's `boxed_reward_fn`): the last `\boxed` of the response, optional white space, a brace group with
balanced braces. No box, an unclosed last box, `\fbox` and `\boxed 5` are unformatted; `\boxed{}` is formatted and empty.

`answer_tag` (the paper's `answer_tag_reward_fn`): the response holds `</think> <answer>` with exactly one space
(with `allow_tag_whitespace`, any or no white space) and `</answer>`. The answer is what follows the last `<answer>`,
without `</answer>`; if it holds a `\boxed`, the box decides, and an unclosed one is a wrong answer, not an
unformatted one.

`answer` (the paper's `answer_tag_reward_fn_for_orz`): the same without `</think>`: `<answer>` and `</answer>` suffice.

`auto` (for grading other people's files, never for training): the last box, `\fbox` and `\boxed 5` included; else the
last `<answer>` element; else the final-answer text (`freeform`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from .freeform import final_answer

Template = Literal["boxed", "answer_tag", "answer", "auto"]
TEMPLATES: tuple[Template, ...] = get_args(Template)
TAGGED: tuple[Template, ...] = ("answer_tag", "answer")


@dataclass(frozen=True, slots=True)
class Extraction:
    """What was found.

    Attributes:
        answer: the answer text; None if the response is unformatted.
        alternatives: other spans that may be meant: adjacent boxes read together, then readings of prose.
        reason: why the response is unformatted.
    """

    answer: str | None
    alternatives: tuple[str, ...] = ()
    reason: str | None = None


MAX_BOXES = 20  # that are read together
MAX_GAP = 80  # characters between two such boxes

_STRICT_TAGS = "</think> <answer>"
_LOOSE_TAGS = re.compile(r"</think>\s*<answer>")
_BOX = re.compile(r"\\boxed\s*\{")
_ANY_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{")
_BOX_COMMANDS = ("\\boxed", "\\fbox", "\\framebox")
_TOKEN_BOX = re.compile(r"\\boxed\s+([^\s{}$\\]+)")
_CONNECTOR = re.compile(r"(?:[\s,;.$&]|\\[,;!]|\\q?quad|\\\\|\\text\{\s*(?:and|or)\s*\}|and\b|or\b)*")


def extract(response: str, template: Template, *, allow_tag_whitespace: bool = False) -> Extraction:
    """The answer of a response under a template's rules (see the module's docstring)."""
    if template == "boxed":
        return _from_box(response)
    if template == "answer_tag":
        opened = _LOOSE_TAGS.search(response) if allow_tag_whitespace else _STRICT_TAGS in response
        return _from_tags(response, "</think> <answer>", bool(opened))
    if template == "answer":
        return _from_tags(response, "<answer>", "<answer>" in response)
    return _auto(response)


def _group_end(text: str, opening: int) -> int | None:
    """Position after the brace group that opens at `opening`; braces are counted as the paper does, escaped or not."""
    depth = 0
    for match in re.compile(r"[{}]").finditer(text, opening):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return match.end()
    return None


def last_box(response: str) -> str | None:
    r"""Content of the last `\boxed{...}`; None if there is none or it is not closed."""
    start = response.rfind("\\boxed")
    if start < 0:
        return None
    match = _BOX.match(response, start)
    if match is None:
        return None
    end = _group_end(response, match.end() - 1)
    return None if end is None else response[match.end() : end - 1]


def _from_box(response: str) -> Extraction:
    answer = last_box(response)
    if answer is None:
        reason = "the last \\boxed is not closed" if "\\boxed" in response else "no \\boxed{} in the response"
        return Extraction(None, reason=reason)
    return Extraction(answer, adjacent_boxes(response))


def adjacent_boxes(response: str) -> tuple[str, ...]:
    r"""The last boxes joined by commas if nothing but connectors stands between them (`\boxed{1}, \boxed{2}`)."""
    spans: list[tuple[int, int, str]] = []
    position = _tail_start(response)
    for match in _BOX.finditer(response, position):
        if match.start() < position:
            continue
        end = _group_end(response, match.end() - 1)
        if end is None:
            break
        spans.append((match.start(), end, response[match.end() : end - 1]))
        position = end
    run = spans[-1:]
    for earlier in reversed(spans[:-1]):
        gap = run[0][0] - earlier[1]
        if gap > MAX_GAP or not _CONNECTOR.fullmatch(response, earlier[1], run[0][0]):
            break
        run.insert(0, earlier)
    return (", ".join(content for _, _, content in run),) if len(run) > 1 else ()


def _tail_start(response: str) -> int:
    """Where the last MAX_BOXES boxes begin."""
    start = len(response)
    for _ in range(MAX_BOXES):
        earlier = response.rfind("\\boxed", 0, start)
        if earlier < 0:
            break
        start = earlier
    return start


def _from_tags(response: str, opening: str, opened: bool) -> Extraction:
    if not opened or "</answer>" not in response:
        return Extraction(None, reason=f"no '{opening}' ... '</answer>' in the response")
    answer = response.rpartition("<answer>")[2].replace("</answer>", "")
    if "\\boxed" in answer:
        return Extraction(last_box(answer) or "")
    if not response.rstrip().endswith("</answer>"):
        return Extraction(answer)
    return Extraction(answer, final_answer(answer))


def _auto(response: str) -> Extraction:
    start = max(response.rfind(box) for box in _BOX_COMMANDS)
    if start >= 0:
        return _from_any_box(response, start)
    if "<answer>" in response and "</answer>" in response:
        answer = response.rpartition("<answer>")[2].partition("</answer>")[0]
        return Extraction(answer, final_answer(answer))
    spans = final_answer(response)
    if not spans:
        return Extraction(None, reason="no answer in the response")
    return Extraction(spans[0], spans[1:])


def _from_any_box(response: str, start: int) -> Extraction:
    """The box that begins at `start`: a brace group, or a single token as TeX allows."""
    if match := _ANY_BOX.match(response, start):
        end = _group_end(response, match.end() - 1)
        if end is None:
            return Extraction(None, reason="the last box is not closed")
        return Extraction(response[match.end() : end - 1], adjacent_boxes(response))
    if match := _TOKEN_BOX.match(response, start):
        return Extraction(match.group(1).rstrip(".,"))
    return Extraction(None, reason="a box without its content")
