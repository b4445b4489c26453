"""From the broker's groups to the rows that a rank trains on.

Invariant: the plan of a step is a pure function of the recipe and of the headers that rank 0 was given, so that
every rank computes the same one without talking. The random permutation runs over the *scheduled* responses:
groups that were filtered leave gaps in it, and so neither enlarge the weight of the others (I5) nor move them
to another optimizer step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.messages import Batch, GroupHeader, GroupId
from common.recipe.schema import Recipe
from learner.objectives import Objective, ResponseTokens, StepSize
from learner.packing import PackedBatch, optimizer_steps, pack, plan_micro_batches

Payload = Sequence[bytes | memoryview]


class UpdatePlan(NamedTuple):
    """One optimizer step: `rows[rank][i]` lists the responses of that rank's i-th micro-batch."""

    rows: list[list[list[int]]]
    size: StepSize


class Row(NamedTuple):
    """One micro-batch of this rank; `current` [T] marks tokens that the step's own version sampled."""

    batch: PackedBatch
    tokens: ResponseTokens
    current: Tensor


@dataclass(frozen=True)
class Responses:
    """What the headers say about the n = groups × G responses of a step, in the broker's order.

    Attributes:
        step: the step, which is also the version that trains.
        prompt_tokens, tokens: [n] int64, lengths.
        rewards: [groups, G] float32.
        verdicts: n of them.
        truncated: [n] bool, cut at the generation budget.
        versions: for each response its run-length pairs (version, tokens).
        groups: for each response its group.
    """

    step: int
    prompt_tokens: Tensor
    tokens: Tensor
    rewards: Tensor
    verdicts: tuple[str, ...]
    truncated: Tensor
    versions: tuple[tuple[tuple[int, int], ...], ...]
    groups: tuple[GroupId, ...]

    @property
    def count(self) -> int:
        """n."""
        return len(self.verdicts)

    @classmethod
    def of(cls, batch: Batch, group_size: int) -> Responses:
        """Read the headers of a batch of complete groups.

        Raises:
            ValueError: a group is not complete (I7).
        """
        for header in batch.groups:
            if len(header.responses) != group_size:
                raise ValueError(
                    f"group {header.group} has {len(header.responses)} of {group_size} responses"
                )
        flat = [(header, response) for header in batch.groups for response in header.responses]
        rewards = torch.tensor([response.reward for _, response in flat], dtype=torch.float32)
        return cls(
            step=batch.step,
            prompt_tokens=torch.tensor([header.prompt_tokens for header, _ in flat], dtype=torch.int64),
            tokens=torch.tensor([response.tokens for _, response in flat], dtype=torch.int64),
            rewards=rewards.view(len(batch.groups), group_size),
            verdicts=tuple(response.verdict for _, response in flat),
            truncated=torch.tensor([response.finish == "length" for _, response in flat], dtype=torch.bool),
            versions=tuple(tuple(response.versions) for _, response in flat),
            groups=tuple(header.group for header, _ in flat),
        )


def permutation_seed(seed: int, step: int, epoch: int) -> int:
    """Seed of one pass over the responses of a step: resuming needs no generator state for it."""
    return (seed * 1_000_003 + step) * 1009 + epoch


def plan_updates(
    responses: Responses, scheduled: int, recipe: Recipe, ranks: int, crossover: int | None = None
) -> list[UpdatePlan]:
    """Split a step into optimizer steps and those into micro-batches; see `plan_micro_batches`.

    Args:
        scheduled: responses scheduled for the step, filtered ones included.
        ranks: data-parallel ranks.
    """
    lengths = (responses.prompt_tokens + responses.tokens).tolist()
    trained = responses.tokens
    if recipe.batch.truncated == "mask":
        trained = trained.masked_fill(responses.truncated, 0)
    plans = []
    for epoch in range(recipe.algorithm.epochs):
        seed = permutation_seed(recipe.run.seed, responses.step, epoch)
        for slots in optimizer_steps(scheduled, recipe.batch.optimizer_steps, seed):
            if not slots:
                continue
            samples = [slot for slot in slots if slot < responses.count]
            size = StepSize(len(slots), int(trained[samples].sum()))
            rows = plan_micro_batches(
                [lengths[sample] for sample in samples],
                ranks=ranks,
                token_budget=recipe.learner.micro_batch_tokens,
                crossover=crossover,
            )
            plans.append(UpdatePlan([_named(rank, samples) or [[]] for rank in rows], size))
    return plans


def _named(rows: list[list[int]], samples: Sequence[int]) -> list[list[int]]:
    return [[samples[place] for place in row] for row in rows]


def groups_of_rank(plans: Sequence[UpdatePlan], responses: Responses, rank: int) -> list[GroupId]:
    """Groups whose payload a rank needs, in the broker's order."""
    mine = {sample for plan in plans for row in plan.rows[rank] for sample in row}
    return list(dict.fromkeys(responses.groups[sample] for sample in sorted(mine)))


class Texts:
    """Token ids and behaviour log-probabilities of the responses that a rank holds, by response number.

    Ids outside the vocabulary and log-probabilities that are not finite come from a broken or hostile actor:
    such a response keeps its place in every denominator but is not trained on (`invalid`).
    """

    def __init__(
        self, headers: Sequence[GroupHeader], payloads: Mapping[GroupId, Payload], vocabulary: int
    ) -> None:
        self.prompts: dict[int, Tensor] = {}
        self.responses: dict[int, Tensor] = {}
        self.logprobs: dict[int, Tensor] = {}
        self.invalid: set[int] = set()
        number = 0
        for header in headers:
            if header.group in payloads:
                self._read(number, header, payloads[header.group], vocabulary)
            number += len(header.responses)

    def _read(self, first: int, header: GroupHeader, payload: Payload, vocabulary: int) -> None:
        prompt = torch.from_numpy(np.frombuffer(payload[0], "<i4").astype(np.int64))
        ids = torch.from_numpy(np.frombuffer(payload[1], "<i4").astype(np.int64))
        logprobs = torch.from_numpy(np.frombuffer(payload[2], "<f4").astype(np.float32))
        prompt_is_bad = bool(((prompt < 0) | (prompt >= vocabulary)).any())
        bad = (ids < 0) | (ids >= vocabulary) | ~torch.isfinite(logprobs)
        lengths = [response.tokens for response in header.responses]
        parts = zip(ids.split(lengths), logprobs.split(lengths), bad.split(lengths), strict=True)
        for number, (response, logprob, defect) in enumerate(parts, first):
            if prompt_is_bad or bool(defect.any()):
                self.invalid.add(number)
                response, logprob = torch.zeros_like(response), torch.zeros_like(logprob)
            self.prompts[number] = torch.zeros_like(prompt) if prompt_is_bad else prompt
            self.responses[number] = response
            self.logprobs[number] = logprob


class RowBuilder:
    """Builds the rows of one rank for one step.

    Args:
        objective: gives advantages (zero for `gae`, which needs values first) and weights.
        mask_truncated: leave truncated responses out of the loss.
    """

    def __init__(
        self, responses: Responses, texts: Texts, objective: Objective, *, mask_truncated: bool
    ) -> None:
        self._responses = responses
        self._texts = texts
        self._objective = objective
        self._advantages = self._group_advantages()
        self._valid = torch.ones(responses.count, dtype=torch.bool)
        self._valid[sorted(texts.invalid)] = False
        keep = self._valid & ~responses.truncated if mask_truncated else self._valid
        self._keep = None if bool(keep.all()) else keep

    def _group_advantages(self) -> Tensor:
        if self._objective.advantage == "gae":
            return torch.zeros(self._responses.count)
        names = [str(group) for group in dict.fromkeys(self._responses.groups)]
        return self._objective.advantages(self._responses.rewards, names).flatten()

    def rows(self, plan: UpdatePlan, rank: int) -> list[Row]:
        """The rows of `rank` for one optimizer step."""
        weights = self._objective.weights(self._responses.tokens, plan.size)
        return [self._row(samples, weights) for samples in plan.rows[rank]]

    def _row(self, samples: Sequence[int], weights: Tensor) -> Row:
        texts = self._texts
        batch = pack(samples, texts.prompts, texts.responses)
        lags = [self._lags(sample) for sample in samples]
        staleness = torch.from_numpy(np.concatenate(lags)) if lags else torch.empty(0, dtype=torch.int64)
        tokens = ResponseTokens(
            sequence=batch.sequence,
            count=len(samples),
            weights=batch.per_token(weights),
            advantages=batch.per_token(self._advantages),
            behaviour_logp=batch.concatenate(texts.logprobs, torch.float32),
            staleness=staleness,
            mask=None if self._keep is None else batch.per_token(self._keep),
        )
        return Row(batch, tokens, (staleness == 0) & batch.per_token(self._valid))

    def _lags(self, sample: int) -> np.ndarray:
        """[tokens] int64: versions between sampling and this step."""
        versions, counts = zip(*self._responses.versions[sample], strict=True)
        return self._responses.step - np.repeat(np.array(versions, dtype=np.int64), counts)
