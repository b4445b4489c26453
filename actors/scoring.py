"""Samples to verdicts and rewards.

Invariant: every sample gets exactly one of the five verdicts; a verifier that fails yields `unverified`, never `wrong`.
In training a response cut at the budget is `truncated` with reward 0, unseen by the verifier (paper section 3.4). In an
evaluation the paper reads it like any other: it is `correct` if its answer is, else `truncated`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from actors.engine import Sample
from common.messages import Scored, Verdict


class Score(NamedTuple):
    """Verdict and reward of one response."""

    verdict: Verdict
    reward: float


class Grader(Protocol):
    """What scores a response: `common.verifier.VerifierPool`."""

    async def grade(self, response: str, question: Mapping[str, Any]) -> Any:
        """A `common.verifier.Verdict`."""


TRUNCATED = Score("truncated", 0.0)


class Scorer:
    """Scores samples in the verifier's processes; `waiting` are those not answered yet."""

    def __init__(self, grader: Grader) -> None:
        self._grader = grader
        self.waiting = 0

    async def warm_up(self) -> None:
        """Start the verifier's processes, which import for seconds, before the first response needs them."""
        await self._grader.grade(r"\boxed{1/2}", {"problem": "", "answer": "0.5"})

    async def score(self, question: Mapping[str, Any], samples: Sequence[Sample]) -> list[Score]:
        """Scores of all samples of a question, in order, as training counts them."""
        return list(await asyncio.gather(*(self._of_training(question, sample) for sample in samples)))

    async def evaluate(self, question: Mapping[str, Any], samples: Sequence[Sample]) -> list[Score]:
        """The same as an evaluation counts them: a right answer before the cut is right."""
        return list(await asyncio.gather(*(self._of_evaluation(question, sample) for sample in samples)))

    async def _of_training(self, question: Mapping[str, Any], sample: Sample) -> Score:
        return TRUNCATED if sample.finish == "length" else await self._grade(question, sample)

    async def _of_evaluation(self, question: Mapping[str, Any], sample: Sample) -> Score:
        found = await self._grade(question, sample)
        return TRUNCATED if sample.finish == "length" and found.verdict != "correct" else found

    async def _grade(self, question: Mapping[str, Any], sample: Sample) -> Score:
        self.waiting += 1
        try:
            found = await self._grader.grade(sample.text, question)
        finally:
            self.waiting -= 1
        return Score(found.verdict.value, found.reward)


def scored(sample: Sample, score: Score, *, text_chars: int) -> Scored:
    """A row of an evaluation, with so many characters of its text; without any where 0."""
    text = sample.text[:text_chars] if text_chars else None
    return Scored(verdict=score.verdict, reward=score.reward, tokens=len(sample.tokens), text=text)
