"""Who says whether a response answers the question, and whether it reflects on itself.

Two judges, one interface: rules that run anywhere, and a model behind an OpenAI-compatible server (the paper's was
gpt-4o-mini-2024-07-18). Neither is trusted alone: the paper counts a self-reflection only where a keyword and the
judge agree (section 2.3), and so do we.

Invariant: a judge's answer depends on question and response only, and a reply of a model that names no category is
`UNKNOWN`, never a guess.
"""

from __future__ import annotations

import re
from enum import IntEnum
from typing import Protocol

from studies.openai_client import OpenAIClient
from studies.study import Setting

# Section 2.3 of the paper; matched without regard to case, anywhere. "wait" and "try again" are left out there,
# because they mean other things too often.
KEYWORDS = (
    "recheck",
    "rethink",
    "reassess",
    "reevaluate",
    "re-evaluate",
    "reevaluation",
    "re-examine",
    "reexamine",
    "reconsider",
    "reanalyze",
    "double-check",
    "check again",
    "think again",
    "verify again",
    "go over the steps",
)


def keywords_in(response: str) -> list[str]:
    """The keywords of the pool that occur in a response."""
    lowered = response.lower()
    return [keyword for keyword in KEYWORDS if keyword in lowered]


class Reflection(IntEnum):
    """The judge's categories."""

    UNKNOWN = -1  # the judge's reply named none
    OFF_TOPIC = 0
    NONE = 1  # answers without a second look
    REFLECTS = 2
    CODE = 3  # nothing but a program


class Judge(Protocol):
    """What the studies ask."""

    def answers(self, question: str, response: str) -> bool | None:
        """Whether the response answers (and does not continue or leave) the question; None: cannot tell."""

    def reflects(self, question: str, response: str) -> Reflection:
        """Whether the response looks back on its own reasoning."""


def judge_of(setting: Setting) -> Judge:
    """The judge model of a setting, or the rules."""
    if setting.judge is None:
        return RuleJudge()
    return ModelJudge(OpenAIClient(setting.judge, setting.judge_model, setting="--judge"))


_ANSWER = re.compile(r"\\boxed\s*\{|<answer>|(?:answer|result) is\b", re.IGNORECASE)
_RESULT = re.compile(r"=\s*[-(]?\d")
_CODE = re.compile(r"^\s*(?:```python|import \w|from \w+ import|def \w+\(|print\()", re.MULTILINE)
# The writer turns to what it has written: a first person or an interjection opens the sentence. A bare imperative
# inside a procedure ("otherwise increase k and check again") is no reflection.
_SPEAKER = r"(?:wait|hmm|hold on|oops|aha|actually|but wait|on second thought|let me|let's|let us|i |we )"
_SECOND_LOOK = (
    r"(?:re-?check|re-?think|re-?assess|re-?evaluat|re-?examin|re-?consider|re-?analy[sz]e|double-check|check again|"
    r"think again|verify again|go over|look again|go back|made a mistake|was wrong|is wrong|not right)"
)
_REFLECTS = re.compile(rf"(?:^|[.!?:\n,]\s*){_SPEAKER}[^.!?\n]*{_SECOND_LOOK}", re.IGNORECASE)
_STOPS_SHORT = re.compile(r"(?:^|[.!?\n]\s*)(?:wait|hold on|oops|aha|on second thought)\b", re.IGNORECASE)


class RuleJudge:
    """Rules for short worked answers; no model, no network."""

    def answers(self, question: str, response: str) -> bool | None:
        for line in response.splitlines():
            if line.rstrip().endswith("?"):  # the next question of a list
                return False
            if _ANSWER.search(line) or _RESULT.search(line):
                return True
        return False

    def reflects(self, question: str, response: str) -> Reflection:
        if _CODE.search(response):
            return Reflection.CODE
        if _REFLECTS.search(response) or _STOPS_SHORT.search(response):
            return Reflection.REFLECTS
        return Reflection.NONE if self.answers(question, response) else Reflection.OFF_TOPIC


_ANSWERING_PROMPT = """You see a text and what a language model wrote after it. Decide which of two things it did.
0: it went on with the text itself, for instance by adding to the question or asking another one.
1: it tried to answer the question, rightly or wrongly.
Reply with the digit alone.

Text:
{question}

Written after it:
{response}
"""
_REFLECTION_PROMPT = """You see a question and a language model's response. Put the response into one category.
0: it has nothing to do with the question, or makes no sense.
1: it answers without looking back on its own reasoning.
2: somewhere it looks back on its own reasoning: checks, doubts, corrects or starts over, in whatever words. This
   category wins over the others.
3: it is nothing but a program.
Explain in a sentence or two, then end with the category's digit on a line of its own.

Question:
{question}

Response:
{response}
"""


class ModelJudge:
    """A judge model behind an OpenAI-compatible server, at temperature 0."""

    def __init__(self, client: OpenAIClient) -> None:
        self._client = client

    def answers(self, question: str, response: str) -> bool | None:
        reply = self._client.chat(_filled(_ANSWERING_PROMPT, question, response), max_tokens=100).strip()
        return {"0": False, "1": True}.get(reply[:1])

    def reflects(self, question: str, response: str) -> Reflection:
        reply = self._client.chat(_filled(_REFLECTION_PROMPT, question, response), max_tokens=300)
        found = re.search(r"([0-3])\W*$", reply)
        return Reflection(int(found.group(1))) if found else Reflection.UNKNOWN


def _filled(prompt: str, question: str, response: str) -> str:
    """The placeholders are filled once: braces in a response stay what they are."""
    head, _, rest = prompt.partition("{question}")
    middle, _, tail = rest.partition("{response}")
    return head + question + middle + response + tail
