"""What a self-reflection does to the answer: the four behaviours of superficial self-reflection.

Source: the analysis that the paper links to ("There may not be Aha moment in R1-Zero-like training"). Behaviours 3
and 4 make a self-reflection superficial.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Any

from common.verifier import Outcome, grade
from studies.judges import KEYWORDS

_MARK = re.compile("|".join(map(re.escape, KEYWORDS)), re.IGNORECASE)
_RESULT = re.compile(r"=\s*([-(]?\d[^\s=]*)")
_BOX = re.compile(r"\\boxed\{([^{}]*)\}")


class Behaviour(StrEnum):
    """Answer before the second thought -> answer after it."""

    CONFIRMS = "1 confirms a right answer"
    CORRECTS = "2 corrects a wrong answer"
    BREAKS = "3 breaks a right answer"
    NO_ANSWER = "4 ends without an answer"
    STAYS_WRONG = "wrong before and after"  # none of the four; shown so that the counts add up


SUPERFICIAL = (Behaviour.BREAKS, Behaviour.NO_ANSWER)


def behaviour(response: str, gold: Any, *, correct: bool, answered: bool) -> Behaviour | None:
    """What the first second thought of a response did.

    Args:
        response: the whole text.
        gold: the right answer.
        correct: the verifier's verdict on the whole response.
        answered: it came to an end, with an answer in it.

    Returns:
        None where the response has no keyword, or no result before it.
    """
    mark = _MARK.search(response)
    if mark is None:
        return None
    before = response[: mark.start()]
    results = _BOX.findall(before) or _RESULT.findall(before)
    if not results:
        return None
    was_right = grade(f"\\boxed{{{results[-1]}}}", gold).verdict is Outcome.CORRECT
    if not answered:
        return Behaviour.NO_ANSWER
    if was_right:
        return Behaviour.CONFIRMS if correct else Behaviour.BREAKS
    return Behaviour.CORRECTS if correct else Behaviour.STAYS_WRONG
