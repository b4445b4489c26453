"""The learner's step against a bare PyTorch loop, and packing against padding.

    python -m benchmarks.learner [--model models/minimath-base] [--repeats 5]

Each figure is a ratio of tokens (prompt + response, padding not counted) per CPU second, both sides measured in
turn in this process, with one thread; the median over the repeats is reported. CPU seconds, because they do not
depend on what else the machine does. The learner's side is everything a step costs besides talking to the broker:
planning, reading payloads, packing, all updates, metrics, the snapshot for the weight push. The bare loop is what
a person would write in an afternoon: the same model and updates, no plan, no metrics, no snapshot.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from common.messages import Batch, GroupHeader, GroupId, ResponseHeader
from common.model_files import ModelShape, read_shape
from common.recipe.schema import Recipe
from learner.engine import Engine
from learner.logprobs import PolicyModel
from learner.metrics import batch_metrics, update_metrics
from learner.objective import objective_of
from learner.packing import pack, plan_micro_batches
from learner.prepare import Preparation
from learner.ranks import Ranks, leave_ranks, start_ranks
from learner.snapshot import take_snapshot
from learner.step import PolicyStep

GROUP = 8
CLIP = 0.2


@dataclass(frozen=True)
class Sample:
    """One response with its prompt: token ids, behaviour log-probabilities, advantage."""

    prompt: list[int]
    response: list[int]
    logprobs: list[float]
    advantage: float

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.response)


def make_batch(
    groups: int, mean: float, sigma: float, longest: int, vocabulary: int, seed: int = 0
) -> tuple[Batch, dict[GroupId, list[bytes]]]:
    """Groups of responses with log-normal lengths: `mean` and `sigma` of the logarithm's base and spread."""
    rng = np.random.default_rng(seed)
    headers, payloads = [], {}
    for index in range(groups):
        prompt = rng.integers(0, vocabulary, rng.integers(20, 40), dtype=np.int32)
        lengths = np.clip(rng.lognormal(np.log(mean), sigma, GROUP), 4, longest).astype(int)
        ids = rng.integers(0, vocabulary, lengths.sum(), dtype=np.int32)
        logprobs = np.full(len(ids), -np.log(vocabulary), np.float32)
        rewards = rng.permutation([1.0] * (GROUP // 2) + [0.0] * (GROUP // 2))
        group = GroupId(0, index)
        headers.append(
            GroupHeader(
                group=group,
                lease=1,
                era=1,
                actor="benchmark",
                prompt_tokens=len(prompt),
                responses=[
                    ResponseHeader(
                        tokens=int(tokens), reward=float(reward), verdict="wrong", finish="stop",
                        versions=[(0, int(tokens))],
                    )
                    for tokens, reward in zip(lengths, rewards, strict=True)
                ],
            )
        )  # fmt: skip
        payloads[group] = [prompt.tobytes(), ids.tobytes(), logprobs.tobytes()]
    return Batch(step=0, ready=True, groups=headers, scheduled=groups), payloads


def samples_of(batch: Batch, payloads: dict[GroupId, list[bytes]]) -> list[Sample]:
    """The same batch as lists, for the bare loops."""
    samples = []
    for header in batch.groups:
        prompt, ids, logprobs = (
            np.frombuffer(part, kind).tolist()
            for part, kind in zip(payloads[header.group], ("<i4", "<i4", "<f4"), strict=True)
        )
        mean = sum(response.reward for response in header.responses) / len(header.responses)
        start = 0
        for response in header.responses:
            span = slice(start, start := start + response.tokens)
            samples.append(Sample(prompt, ids[span], logprobs[span], response.reward - mean))
    return samples


def clipped(logp: Tensor, behaviour: Tensor, advantage: Tensor) -> Tensor:
    """Σ of the clipped surrogate."""
    ratio = (logp - behaviour).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).sum()


class BareLoop:
    """AdamW on a model, updates over chunks of the samples; subclasses say how a micro-batch is evaluated."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.model, self.recipe = model, recipe
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=recipe.learner.lr, betas=recipe.learner.betas, weight_decay=0.0, fused=True
        )

    def step(self, samples: Sequence[Sample]) -> None:
        """One policy iteration step."""
        updates = self.recipe.batch.optimizer_steps
        order = np.random.default_rng(0).permutation(len(samples))
        scale = len(samples) / updates * self.recipe.normaliser
        for chunk in np.array_split(order, updates):
            self.optimizer.zero_grad()
            for micro in self.micro_batches([samples[number] for number in chunk]):
                (self.loss(micro) / scale).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.learner.max_grad_norm)
            self.optimizer.step()

    def micro_batches(self, samples: list[Sample]) -> list[list[Sample]]:
        """Split one update."""
        raise NotImplementedError

    def loss(self, samples: list[Sample]) -> Tensor:
        """Forward pass and loss of one micro-batch."""
        raise NotImplementedError


class PackedLoop(BareLoop):
    """The learner's own model and packing without DeepSpeed: what remains is the cost of the system."""

    def micro_batches(self, samples: list[Sample]) -> list[list[Sample]]:
        lengths = [sample.length for sample in samples]
        (rows,) = plan_micro_batches(lengths, ranks=1, token_budget=self.recipe.learner.micro_batch_tokens)
        return [[samples[number] for number in row] for row in rows]

    def loss(self, samples: list[Sample]) -> Tensor:
        row = pack(range(len(samples)), [s.prompt for s in samples], [s.response for s in samples])
        logp, _, _ = self.model(row)
        behaviour = torch.tensor([value for sample in samples for value in sample.logprobs])
        return clipped(logp, behaviour, row.per_token(torch.tensor([s.advantage for s in samples])))


class PaddedLoop(BareLoop):
    """The plain Hugging Face model on right-padded batches of `size` responses, in the order they come."""

    def __init__(self, model: nn.Module, recipe: Recipe, size: int, *, by_length: bool) -> None:
        super().__init__(model, recipe)
        self.size, self.by_length = size, by_length

    def micro_batches(self, samples: list[Sample]) -> list[list[Sample]]:
        if self.by_length:
            samples = sorted(samples, key=lambda sample: sample.length)
        return [samples[low : low + self.size] for low in range(0, len(samples), self.size)]

    def loss(self, samples: list[Sample]) -> Tensor:
        width = max(sample.length for sample in samples)
        tokens, attention = torch.zeros((2, len(samples), width), dtype=torch.int64)
        behaviour, mask = torch.zeros((2, len(samples), width - 1))
        for row, sample in enumerate(samples):
            start, end = len(sample.prompt), sample.length
            tokens[row, :end] = torch.tensor(sample.prompt + sample.response)
            attention[row, :end] = 1
            behaviour[row, start - 1 : end - 1] = torch.tensor(sample.logprobs)
            mask[row, start - 1 : end - 1] = 1
        logits = self.model(input_ids=tokens, attention_mask=attention, use_cache=False).logits[:, :-1]
        logp = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
        advantage = torch.tensor([sample.advantage for sample in samples])[:, None] * mask
        return clipped(torch.where(mask > 0, logp, behaviour), behaviour, advantage)


class LearnerLoop:
    """The learner's step as the process runs it, besides the broker."""

    def __init__(self, model: nn.Module, recipe: Recipe, shape: ModelShape, ranks: Ranks) -> None:
        self.objective = objective_of(recipe)
        self.engine = Engine(PolicyModel(model), recipe, ranks, 10_000)
        self.work = Preparation(recipe, self.objective, shape, 0, 1, None)
        self.policy_step = PolicyStep(self.engine, self.objective)
        self.seconds: dict[str, float] = {}

    def step(self, batch: Batch, payloads: dict[GroupId, list[bytes]]) -> None:
        """Plan, pack, train, measure, copy the weights."""
        started = time.process_time()
        self.work.wanted(batch)
        work = self.work.prepare(batch, payloads)
        started = self._note("prepare", started)
        result = self.policy_step.run(work.updates, work.responses.rewards, work.first_pass)
        started = self._note("train", started)
        batch_metrics(batch, work.responses, work.scheduled)
        update_metrics(result, self.objective)
        started = self._note("metrics", started)
        take_snapshot(self.engine.deepspeed)
        self._note("snapshot", started)

    def _note(self, name: str, started: float) -> float:
        now = time.process_time()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - started
        return now


def compare(contestants: dict[str, Callable[[], None]], tokens: int, repeats: int) -> dict[str, float]:
    """Tokens per CPU second of each, measured in turn; the median of the repeats after one warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(repeats + 1):
        for name, step in contestants.items():
            started = time.process_time()
            step()
            if repeat:
                seconds[name].append(time.process_time() - started)
    return {name: tokens / statistics.median(values) for name, values in seconds.items()}


def build(config: object) -> nn.Module:
    """The model with random weights: the same for every contestant."""
    torch.manual_seed(0)
    # A copy: the attention implementation is kept in the configuration, which models would otherwise share.
    return AutoModelForCausalLM.from_config(
        copy.deepcopy(config), dtype=torch.float32, attn_implementation="sdpa"
    )


def bench_recipe(model: Path, budget: int, updates: int, longest: int, groups: int) -> Recipe:
    """The demo's settings."""
    return Recipe.model_validate(
        {
            "model": {"path": str(model), "dtype": "float32", "max_context": longest + 40},
            "data": {"train": "unused"},
            "rollout": {"group_size": GROUP, "max_tokens": longest},
            "batch": {"questions_per_step": groups, "optimizer_steps": updates},
            "learner": {"lr": 3e-4, "zero_stage": 2, "micro_batch_tokens": budget},
        }
    )


def main() -> None:
    """Print one JSON line per figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("models/minimath-base"))
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape, config = read_shape(str(options.model)), AutoConfig.from_pretrained(options.model)
    ranks = start_ranks(60.0)
    short_against_bare(options, shape, config, ranks)
    heavy_tail_against_padding(options, shape, config, ranks)
    leave_ranks(ranks)


def short_against_bare(options: argparse.Namespace, shape: ModelShape, config: object, ranks: Ranks) -> None:
    """MiniMath's lengths: the learner, and bare loops on the same tokens."""
    recipe = bench_recipe(options.model, 8192, 2, 96, 32)
    batch, payloads = make_batch(32, 40, 0.4, 96, shape.vocab)
    samples = samples_of(batch, payloads)
    learner = LearnerLoop(build(config), recipe, shape, ranks)
    packed = PackedLoop(PolicyModel(build(config)), recipe)
    padded = PaddedLoop(build(config), recipe, 64, by_length=True)
    rates = compare(
        {
            "learner": lambda: learner.step(batch, payloads),
            "bare packed": lambda: packed.step(samples),
            "bare padded, sorted": lambda: padded.step(samples),
        },
        sum(sample.length for sample in samples),
        options.repeats,
    )
    total = sum(learner.seconds.values())
    report("learner step, MiniMath lengths", rates, {n: s / total for n, s in learner.seconds.items()})
    learner.engine.close()


def heavy_tail_against_padding(
    options: argparse.Namespace, shape: ModelShape, config: object, ranks: Ranks
) -> None:
    """Heavy-tailed lengths: token-budget packing against padded batches of a fixed number of responses."""
    longest = min(480, shape.context - 40)
    recipe = bench_recipe(options.model, 4096, 2, longest, 16)
    batch, payloads = make_batch(16, 60, 1.0, longest, shape.vocab)
    samples = samples_of(batch, payloads)
    learner = LearnerLoop(build(config), recipe, shape, ranks)
    padded = PaddedLoop(build(config), recipe, 16, by_length=False)
    ordered = PaddedLoop(build(config), recipe, 16, by_length=True)
    rates = compare(
        {
            "learner": lambda: learner.step(batch, payloads),
            "padded": lambda: padded.step(samples),
            "padded, sorted": lambda: ordered.step(samples),
        },
        sum(sample.length for sample in samples),
        options.repeats,
    )
    report("packing, heavy-tailed lengths", rates, {})
    learner.engine.close()


def report(name: str, rates: dict[str, float], shares: dict[str, float]) -> None:
    """One figure: tokens per CPU second, and the learner's ratio to each reference."""
    ratios = {other: rates["learner"] / rate for other, rate in rates.items() if other != "learner"}
    line = {
        "figure": name,
        "tokens_per_cpu_s": {key: round(rate) for key, rate in rates.items()},
        "ratio_to": {key: round(value, 3) for key, value in ratios.items()},
        "learner_shares": {key: round(value, 4) for key, value in shares.items()},
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
