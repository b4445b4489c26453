"""What the feed's thread does with a batch while the one before it trains: plan, read, pack.

Invariant: nothing here depends on the policy's weights, so that it can run ahead of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.messages import Batch, GroupId
from common.model_files import ModelShape
from common.recipe.schema import Recipe
from learner.batch import Payload, Responses, Row, RowBuilder, Texts, UpdatePlan, groups_of_rank, plan_updates
from learner.objectives import Objective

SAMPLES_SHOWN = 8
ATTENTION_CROSSOVER = 12  # hidden sizes of length at which attention costs as much as the rest of a layer


@dataclass(frozen=True)
class Work:
    """A step, ready to train on by one rank.

    Attributes:
        responses: headers of all ranks' responses.
        updates: this rank's rows of each optimizer step.
        first_pass: updates of the first epoch.
        scheduled: responses scheduled for the step.
        trained_tokens: prompt and response tokens that all ranks will process, epochs counted.
        invalid: responses of this rank that are left out as broken.
        samples: a few responses as text, for the tracker; rank 0 only.
    """

    responses: Responses
    updates: list[list[Row]]
    first_pass: int
    scheduled: int
    trained_tokens: int
    invalid: int
    samples: list[dict[str, Any]]


class Preparation:
    """Turns batches into work for one rank."""

    def __init__(
        self, recipe: Recipe, objective: Objective, shape: ModelShape, rank: int, world: int, tokenizer: Any
    ) -> None:
        self._recipe, self._objective, self._shape = recipe, objective, shape
        self._rank, self._world = rank, world
        self._tokenizer = tokenizer
        self._planned: tuple[Responses, list[UpdatePlan]] | None = None

    def wanted(self, batch: Batch) -> Sequence[GroupId]:
        """Groups whose payload this rank needs; plans the step."""
        responses = Responses.of(batch, self._recipe.rollout.group_size)
        plans = plan_updates(
            responses,
            batch.scheduled * self._recipe.rollout.group_size,
            self._recipe,
            self._world,
            ATTENTION_CROSSOVER * self._shape.hidden,
        )
        self._planned = responses, plans
        return groups_of_rank(plans, responses, self._rank)

    def prepare(self, batch: Batch, payloads: Mapping[GroupId, Payload]) -> Work:
        """The work of the step that `wanted` was asked about last."""
        assert self._planned is not None
        responses, plans = self._planned
        texts = Texts(batch.groups, payloads, self._shape.vocab)
        builder = RowBuilder(
            responses, texts, self._objective, mask_truncated=self._recipe.batch.truncated == "mask"
        )
        epochs = self._recipe.algorithm.epochs
        return Work(
            responses=responses,
            updates=[builder.rows(plan, self._rank) for plan in plans],
            first_pass=len(plans) // epochs,
            scheduled=batch.scheduled * self._recipe.rollout.group_size,
            trained_tokens=int((responses.prompt_tokens + responses.tokens).sum()) * epochs,
            invalid=len(texts.invalid),
            samples=self._samples(responses, texts),
        )

    def _samples(self, responses: Responses, texts: Texts) -> list[dict[str, Any]]:
        if self._tokenizer is None or responses.step % self._recipe.tracking.samples_every:
            return []
        return [self._sample(responses, texts, number) for number in sorted(texts.responses)[:SAMPLES_SHOWN]]

    def _sample(self, responses: Responses, texts: Texts, number: int) -> dict[str, Any]:
        return {
            "group": str(responses.groups[number]),
            "prompt": self._tokenizer.decode(texts.prompts[number]),
            "response": self._tokenizer.decode(texts.responses[number]),
            "verdict": responses.verdicts[number],
            "reward": float(responses.rewards.flatten()[number]),
            "tokens": int(responses.tokens[number]),
            "versions": [list(run) for run in responses.versions[number]],
        }
