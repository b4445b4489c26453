"""Held-out evaluation beside training: one version answers every question, and training goes on.

Invariant: all answers of a job are sampled by one version, because commits wait while they are generated; they
do not wait for the verifier. Training groups share the engine meanwhile (and are of that version too).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple, Protocol

from actors.engine import Engine, Sample, Sampling
from actors.policy import Policy
from actors.prompts import Prompts
from actors.scoring import Scorer, scored
from common.messages import EvalJob, EvalQuestion, EvalResult, EvalRow, Scored

log = logging.getLogger("slipstream.actor.evaluation")

# Questions of a set of which two answers are kept as text, the greedy one and a sampled one.
TEXTS_PER_SET = 4
TEXT_CHARS = 8000  # kept of an answer: all answers of an evaluation travel in one message
TOO_LONG = Scored(verdict="truncated", reward=0.0, tokens=0)


class Weights(Protocol):
    """What an evaluation needs of the weight receiver."""

    @property
    def cache_salt(self) -> str | None:
        """See `WeightReceiver.cache_salt`."""

    @property
    def lora(self) -> Any | None:
        """See `WeightReceiver.lora`."""

    def pinned(self) -> AbstractAsyncContextManager[int]:
        """Postpones commits while inside; yields the version."""


class Answers(NamedTuple):
    """Samples of one question; `greedy` is None when its prompt does not fit the context."""

    question: EvalQuestion
    greedy: Sample | None
    sampled: list[Sample]


class Evaluator:
    """Answers evaluation jobs with the running engine.

    Attributes:
        answered: questions answered and scored so far.
    """

    def __init__(
        self, engine: Engine, prompts: Prompts, scorer: Scorer, policy: Policy, weights: Weights
    ) -> None:
        self._engine, self._prompts, self._scorer = engine, prompts, scorer
        self._policy, self._weights = policy, weights
        self.answered = 0

    async def answer(self, job: EvalJob) -> EvalResult:
        """Greedy and sampled answers to every question, scored."""
        started = time.monotonic()
        async with self._weights.pinned() as version:
            era = self._policy.era
            answers = await asyncio.gather(*(self._generate(job, question) for question in job.questions))
        seen: Counter[str] = Counter()
        rows = await asyncio.gather(*(self._row(found, seen) for found in answers))
        seconds = time.monotonic() - started
        log.info("evaluation %d: %d questions at version %d in %.1f s", job.job, len(rows), version, seconds)
        return EvalResult(job=job.job, version=version, era=era, rows=list(rows), seconds=seconds)

    async def _generate(self, job: EvalJob, question: EvalQuestion) -> Answers:
        prompt = self._prompts.encode(question.question["problem"])
        if not 0 < len(prompt) < self._engine.max_context:
            return Answers(question, None, [])
        both = [self._samples(prompt, 1, self._sampling(job, 0.0))]
        if job.samples:
            both.append(self._samples(prompt, job.samples, self._sampling(job, job.temperature)))
        greedy, *sampled = await asyncio.gather(*both)
        return Answers(question, greedy[0], sampled[0] if sampled else [])

    async def _samples(self, prompt: list[int], count: int, sampling: Sampling) -> list[Sample]:
        weights = self._weights
        return await self._engine.generate(
            prompt, count, sampling, cache_salt=weights.cache_salt, lora=weights.lora
        )

    def _sampling(self, job: EvalJob, temperature: float) -> Sampling:
        template = self._prompts.template
        return Sampling(temperature, job.max_tokens, tuple(template.stop), template.include_stop)

    async def _row(self, answers: Answers, seen: Counter[str]) -> EvalRow:
        question = answers.question
        seen[question.set] += 1
        keep_text = seen[question.set] <= TEXTS_PER_SET
        if answers.greedy is None:
            return EvalRow(set=question.set, uid=question.uid, greedy=TOO_LONG, sampled=[])
        samples = [answers.greedy, *answers.sampled]
        scores = await self._scorer.evaluate(question.question, samples)
        self.answered += 1
        rows = [
            scored(sample, score, text_chars=TEXT_CHARS if keep_text and number < 2 else 0)
            for number, (sample, score) in enumerate(zip(samples, scores, strict=True))
        ]
        return EvalRow(set=question.set, uid=question.uid, greedy=rows[0], sampled=rows[1:])
