"""Evaluation of a model at rest: every question of some sets, answered by an engine of its own.

Invariant: the answer to a question depends on the plan, the question and nothing else: greedy, or drawn with
random numbers that belong to (seed, set, question, sample). Which questions run beside it, or were answered
before an interruption, makes no difference beyond the engine's rounding.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from actors.engine import Engine, Sample, Sampling
from actors.prompts import Prompts
from common.errors import UserError
from common.evaluation import Answer, AnswerFile, Response
from common.tasks.sets import load_questions
from common.tasks.templates import get_template
from common.verifier import VerifierPool
from common.verifier.grade import Level

# Settings that an answer depends on; the others only say how fast it comes, or how many are asked for.
_DECISIVE = (
    "model",
    "fingerprint",
    "template",
    "samples",
    "temperature",
    "max_tokens",
    "max_context",
    "level",
    "dtype",
    "seed",
)


class Question(NamedTuple):
    """A row of a question set."""

    set: str
    row: dict[str, Any]

    @property
    def key(self) -> tuple[str, str]:
        """Set and uid."""
        return self.set, str(self.row["uid"])


@dataclass(frozen=True)
class EvalPlan:
    """What is evaluated and how.

    Attributes:
        model: folder or hub id; `fingerprint` tells two states of one folder apart.
        sets: question sets.
        template: name, or a text with {question}.
        samples: sampled responses per question at `temperature`; 0 is one greedy response.
        max_tokens, max_context: budget of a response; prompt and response; in tokens.
        level: of the verifier.
        limit: questions per set at most.
        seed: of sampling.
        sequences, tensor_parallel, kv_cache_mb: of the engine.
        trust_remote_code: run code that comes with the model.
    """

    model: str
    fingerprint: str
    sets: tuple[str, ...]
    template: str
    samples: int
    temperature: float
    max_tokens: int
    max_context: int
    level: Level
    dtype: str
    limit: int | None
    seed: int
    sequences: int
    tensor_parallel: int
    kv_cache_mb: int | None
    trust_remote_code: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """What an answer depends on."""
        return {name: getattr(self, name) for name in _DECISIVE}

    @property
    def digest(self) -> str:
        """Eight characters that name the settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def engine_arguments(self) -> dict[str, Any]:
        """Arguments of `Engine`."""
        arguments: dict[str, Any] = {
            "model": self.model,
            "dtype": self.dtype,
            "trust_remote_code": self.trust_remote_code,
            "max_model_len": self.max_context,
            "max_num_seqs": self.sequences,
            "tensor_parallel_size": self.tensor_parallel,
            "enable_prefix_caching": True,
            "logprobs_mode": "processed_logprobs",
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "seed": self.seed,
        }
        if self.kv_cache_mb is not None:
            arguments["kv_cache_memory_bytes"] = self.kv_cache_mb << 20
        return arguments


def plan_questions(plan: EvalPlan, data_dir: Path | None) -> list[Question]:
    """The questions of all sets, in order.

    Raises:
        UserError: an unknown set, or one that cannot be read.
    """
    questions: list[Question] = []
    for name in dict.fromkeys(plan.sets):
        try:
            rows = load_questions(name, data_dir=data_dir, limit=plan.limit)
        except UserError as error:
            raise UserError(str(error), setting="--benchmark") from None
        questions += [Question(name, row) for row in rows]
    return questions


def unanswered(questions: Sequence[Question], file: AnswerFile) -> list[Question]:
    """Questions that the file has no answer to, or had one under another wording or gold answer."""
    left = []
    for question in questions:
        answer = file.answers.get(question.key)
        known = answer is not None and (answer.problem, answer.gold) == _identity(question.row)
        if not known:
            left.append(question)
    return left


def _identity(row: dict[str, Any]) -> tuple[str, Any]:
    return row["problem"], row["answer"]


async def answer_all(
    plan: EvalPlan,
    engine: Engine,
    questions: Sequence[Question],
    file: AnswerFile,
    on_answer: Callable[[Answer], None],
) -> None:
    """Answer `questions` with a started engine and append each answer as it is finished."""
    template = get_template(plan.template, model=plan.model, trust_remote_code=plan.trust_remote_code)
    await engine.warm_up()
    with VerifierPool(level=plan.level, template=template.extraction) as grader:
        examination = _Examination(plan, engine, Prompts(engine.tokenizer, template), grader)

        async def one(question: Question) -> None:
            answer = await examination.answer(question)
            file.append(answer)
            on_answer(answer)

        async with asyncio.TaskGroup() as tasks:
            for question in questions:
                tasks.create_task(one(question))


class _Examination:
    """One engine, one template, one verifier, and as many sequences at a time as never preempt one another."""

    def __init__(self, plan: EvalPlan, engine: Engine, prompts: Prompts, grader: VerifierPool) -> None:
        self._plan, self._engine, self._prompts, self._grader = plan, engine, prompts, grader
        # vLLM on the CPU cannot resume a preempted request that has a seed of its own: never let one be.
        fit = max(1, engine.kv_cache_tokens // plan.max_context)
        self._slots = asyncio.Semaphore(min(plan.sequences, fit) if plan.samples else 2 * plan.sequences)

    async def answer(self, question: Question) -> Answer:
        """All responses to one question, graded."""
        prompt = self._prompts.encode(question.row["problem"])
        if 0 < len(prompt) < self._engine.max_context:
            samples = await asyncio.gather(*(self._sample(prompt, s) for s in self._samplings(question)))
        else:
            samples = []
        responses = await asyncio.gather(*(self._grade(sample, question.row) for sample in samples))
        problem, gold = _identity(question.row)
        set_name, uid = question.key
        return Answer(
            set_name, uid, problem, gold, tuple(responses) or (_TOO_LONG,) * max(1, self._plan.samples)
        )

    def _samplings(self, question: Question) -> list[Sampling]:
        plan, template = self._plan, self._prompts.template
        stop = tuple(template.stop), template.include_stop
        if not plan.samples:
            return [Sampling(0.0, plan.max_tokens, *stop)]
        seeds = (_seed(plan.seed, *question.key, index) for index in range(plan.samples))
        return [Sampling(plan.temperature, plan.max_tokens, *stop, seed=seed) for seed in seeds]

    async def _sample(self, prompt: list[int], sampling: Sampling) -> Sample:
        async with self._slots:
            (sample,) = await self._engine.generate(prompt, 1, sampling)
            return sample

    async def _grade(self, sample: Sample, row: dict[str, Any]) -> Response:
        found = await self._grader.grade(sample.text, row["answer"])
        return Response(
            text=sample.text,
            tokens=len(sample.tokens),
            finish=sample.finish,
            verdict=found.verdict.value,
            extracted=found.extracted,
            reward=found.reward,
        )


def _seed(*name: Any) -> int:
    """32 bits that belong to a name."""
    return int.from_bytes(hashlib.sha256(json.dumps(name).encode()).digest()[:4], "big")


_TOO_LONG = Response("", 0, "length", "unformatted", None, 0.0)  # the prompt does not fit the context
