"""Small reinforcement-learning runs in one process, made of the learner's own parts.

A study compares objectives, templates or data over many short runs; starting engine, broker and DeepSpeed for each
would take most of the time. So the miniature samples with transformers and updates with a plain AdamW, and takes
from the learner what is studied: advantages, losses, corrections, aggregation, packing, packed attention,
chunked log-probabilities. Full-size runs use the pipeline itself (`studies.pipeline`).

Invariant: the policy that samples a response is the one whose log-probabilities are recorded with it, and a batch
is trained on exactly `staleness` versions later (fewer only in the first steps): the oldest that admission with
that `batch.max_staleness` lets through.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.tasks.templates import Template, get_template
from common.verifier import grade
from learner.attention import PACKED
from learner.logprobs import PolicyModel
from learner.objectives import Objective, ResponseTokens, StepSize, TokenMetrics, preset
from learner.packing import PackedBatch, pack, plan_micro_batches
from learner.pretraining.probe import sample_responses
from studies.samplers import Response, decode
from studies.verdict import Row

TOKEN_BUDGET = 8192  # of a micro-batch
CATEGORIES = ("correct", "wrong", "unformatted", "truncated")  # of greedy answers, by level
METRICS = ("ratio_ess", "clip_low_mean", "clip_high_mean", "kl_behaviour_mean", "entropy_mean")


class Problem(NamedTuple):
    """A question as training sees it; `row` is what a reward function gets."""

    text: str
    row: Mapping[str, Any]


Reward = Callable[[str, Mapping[str, Any]], float]


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        model: folder of the base model.
        problems: asked in turn, over and over.
        held_out: answered greedily every `eval_every` steps, and after the last.
        algorithm: preset of the objective, with `changes` to its fields.
        template: name of the prompt template.
        steps: policy iterations, one optimizer step each.
        questions, group: per step, and responses to each question.
        max_tokens: generation budget; also the constant L of the objective.
        lr: of AdamW, chosen by `studies.pilot`: on the training reward of plain GRPO, with a seed of its own.
        staleness: versions between sampling and training.
        reward: response text and row to a number; None: the verifier.
    """

    model: str
    problems: Sequence[Problem]
    held_out: Sequence[Problem]
    algorithm: str = "dr_grpo"
    changes: Mapping[str, Any] = field(default_factory=dict)
    template: str = "no"
    steps: int = 60
    questions: int = 16
    group: int = 8
    max_tokens: int = 48
    lr: float = 3e-4
    staleness: int = 0
    eval_every: int = 20
    seed: int = 0
    reward: Reward | None = None


class Experience(NamedTuple):
    """A sampled batch: token ids and log-probabilities of n = questions × G responses, and their rewards."""

    version: int
    prompts: list[list[int]]
    responses: list[list[int]]
    texts: list[Response]
    rewards: Tensor
    logps: list[Tensor]


def train(run: Run) -> list[Row]:
    """Carry out a run; rows of kind `train` (one per step) and `eval`."""
    torch.manual_seed(run.seed)
    loop = _Loop(run)
    rows: list[Row] = []
    waiting: deque[Experience] = deque()
    for step in range(run.steps):
        if step % run.eval_every == 0:
            rows.append(loop.evaluate(step))
        while len(waiting) <= run.staleness:
            waiting.append(loop.experience(step))
        batch = waiting.popleft()
        rows.append({"kind": "train", "step": step, **loop.update(batch, step), **_summary(batch)})
    rows.append(loop.evaluate(run.steps))
    return rows


class _Loop:
    """Model, optimizer and questions of a run."""

    def __init__(self, run: Run) -> None:
        from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

        self._run = run
        self._template: Template = get_template(run.template)
        self._objective: Objective = preset(run.algorithm, **{"normaliser": run.max_tokens, **run.changes})
        self._tokenizer = Qwen2Tokenizer.from_pretrained(run.model)
        self._policy = PolicyModel(Qwen2ForCausalLM.from_pretrained(run.model, dtype=torch.float32))
        self._optimizer = torch.optim.AdamW(
            self._policy.parameters(), lr=run.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self._problems = cycle(run.problems)
        self._verdicts: dict[tuple[str, str], float] = {}

    def experience(self, version: int) -> Experience:
        """Sample and score a batch with the current weights."""
        run = self._run
        problems = list(islice(self._problems, run.questions))
        ids = self._generate(problems, run.group, temperature=1.0)
        owners = [problem for problem in problems for _ in range(run.group)]
        texts = [decode(row, self._tokenizer, self._template) for row in ids]
        rewards = torch.tensor([self._score(*pair) for pair in zip(texts, owners, strict=True)])
        prompts = self._tokenizer([self._template.render(problem.text) for problem in owners])["input_ids"]
        responses = [row[: text.tokens] for row, text in zip(ids, texts, strict=True)]
        recorded = run.staleness > 0 or self._objective.needs_step_limit
        logps = self._logps(prompts, responses) if recorded else []
        return Experience(version, prompts, responses, texts, rewards.view(-1, run.group), logps)

    def update(self, batch: Experience, step: int) -> dict[str, float]:
        """One optimizer step on a batch; returns the objective's metrics."""
        advantages = self._objective.advantages(batch.rewards).flatten()
        lengths = torch.tensor([len(response) for response in batch.responses])
        size = StepSize(responses=len(lengths), tokens=int(lengths.sum()))
        weights = self._objective.weights(lengths, size)
        # Groups without variance have no gradient: counted in N, not computed.
        trained = [index for index, advantage in enumerate(advantages.tolist()) if advantage != 0.0]
        limit = self._limit(batch, trained)
        total = TokenMetrics.zero()
        for micro in self._rows(batch.prompts, batch.responses, trained):
            logp, entropy, _ = self._policy(micro)
            tokens = ResponseTokens(
                sequence=micro.sequence,
                count=len(micro.samples),
                weights=micro.per_token(weights),
                advantages=micro.per_token(advantages),
                behaviour_logp=micro.concatenate(batch.logps, torch.float32)
                if batch.logps
                else logp.detach(),
                staleness=torch.full_like(micro.targets, step - batch.version),
            )
            loss, metrics = self._objective.token_loss(logp, tokens, entropy=entropy, step_limit=limit)
            loss.backward()
            total = total + metrics
        norm = torch.nn.utils.clip_grad_norm_(self._policy.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        summary = total.summary()
        return {"gradient": float(norm), **{name: summary[name] for name in METRICS if name in summary}}

    def evaluate(self, step: int) -> Row:
        """Greedy answers to the held-out questions."""
        ids = self._generate(self._run.held_out, 1, temperature=0.0)
        texts = [decode(row, self._tokenizer, self._template) for row in ids]
        scores = [self._score(*pair) for pair in zip(texts, self._run.held_out, strict=True)]
        return {
            "kind": "eval",
            "step": step,
            "score": sum(score >= 1.0 for score in scores) / len(texts),
            "tokens": sum(text.tokens for text in texts) / len(texts),
            **({} if self._run.reward else self._categories(texts)),
        }

    def _categories(self, texts: Sequence[Response]) -> dict[str, Any]:
        """Counts by level and category (`2/wrong`), and mean characters by category."""
        counts: Counter[str] = Counter()
        characters: defaultdict[str, list[int]] = defaultdict(list)
        for text, problem in zip(texts, self._run.held_out, strict=True):
            category = self._category(text, problem)
            counts[f"{problem.row['level']}/{category}"] += 1
            characters[category].append(len(text.text))
        return {
            "categories": dict(counts),
            "characters": {name: sum(found) / len(found) for name, found in characters.items()},
        }

    def _category(self, response: Response, problem: Problem) -> str:
        if not response.finished:
            return "truncated"
        return str(grade(response.text, problem.row["answer"], template=self._template.extraction).verdict)

    def _generate(self, problems: Sequence[Problem], samples: int, temperature: float) -> list[list[int]]:
        lm = self._policy.lm
        lm.set_attn_implementation("sdpa")  # packed attention keeps no cache to decode with
        prompts = [self._template.render(problem.text) for problem in problems]
        try:
            ids = sample_responses(
                lm,
                self._tokenizer,
                prompts,
                samples=samples,
                max_tokens=self._run.max_tokens,
                temperature=temperature,
            )
        finally:
            lm.set_attn_implementation(PACKED)
        return ids.tolist()

    def _score(self, response: Response, problem: Problem) -> float:
        """The verifier's reward; a response cut at the budget earns nothing."""
        if not response.finished:
            return 0.0
        if self._run.reward is not None:
            return self._run.reward(response.text, problem.row)
        key = (response.text, problem.text)
        if key not in self._verdicts:
            verdict = grade(response.text, problem.row["answer"], template=self._template.extraction)
            self._verdicts[key] = verdict.reward
        return self._verdicts[key]

    def _rows(
        self, prompts: list[list[int]], responses: list[list[int]], samples: Sequence[int]
    ) -> list[PackedBatch]:
        lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
        (plan,) = plan_micro_batches(lengths, ranks=1, token_budget=TOKEN_BUDGET, samples=list(samples))
        return [pack(samples, prompts, responses) for samples in plan]

    @torch.no_grad()
    def _logps(self, prompts: list[list[int]], responses: list[list[int]]) -> list[Tensor]:
        """Behaviour log-probabilities of every response, as an actor records them."""
        found: dict[int, Tensor] = {}
        for micro in self._rows(prompts, responses, range(len(responses))):
            found |= micro.split(self._policy(micro)[0])
        return [found[index] for index in range(len(responses))]

    @torch.no_grad()
    def _limit(self, batch: Experience, trained: Sequence[int]) -> float | None:
        if not self._objective.needs_step_limit or not trained:
            return None
        rho = [
            self._policy(micro)[0] - micro.concatenate(batch.logps, torch.float32)
            for micro in self._rows(batch.prompts, batch.responses, trained)
        ]
        return self._objective.step_limit(torch.cat(rho))


def _summary(batch: Experience) -> dict[str, float | None]:
    rewards = batch.rewards.flatten().tolist()
    scored = list(zip(batch.texts, rewards, strict=True))

    def length(chosen: Callable[[float], bool]) -> float | None:
        lengths = [text.tokens for text, reward in scored if chosen(reward)]
        return sum(lengths) / len(lengths) if lengths else None

    return {
        "version": batch.version,
        "reward": sum(rewards) / len(rewards),
        "length": length(lambda _: True),
        "length_correct": length(lambda reward: reward >= 1.0),
        "length_incorrect": length(lambda reward: reward < 1.0),
        "truncated": sum(not text.finished for text in batch.texts) / len(batch.texts),
    }
