"""The policy under DeepSpeed: forward, accumulate, step, at every ZeRO stage, on CPU and GPU.

Invariant (design, I5): the gradient of an optimizer step is the plain sum of what its micro-batches hand to
backward, over micro-batches and ranks. DeepSpeed divides by accumulation steps and averages over ranks; both
vary under a token budget, so both are cancelled here, and nowhere else. Every rank runs the same number of
micro-batches (`learner.packing`), because ZeRO-2 and 3 reduce once per backward.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.errors import RunFailedError
from common.recipe.schema import LearnerSection, Recipe
from learner.logprobs import PolicyModel
from learner.packing import PackedBatch
from learner.ranks import Ranks, bound_all_groups, load_deepspeed
from learner.schedule import lr_factor

log = logging.getLogger("slipstream.learner")

MAX_SKIPPED_IN_A_ROW = 3
MAX_BUCKET_ELEMENTS = 50_000_000
BUCKET_ALIGNMENT = 64  # ZeRO refuses odd sizes

Outputs = tuple[Tensor, Tensor, Tensor | None]


class Update(NamedTuple):
    """One optimizer step: global gradient norm before clipping, whether it was applied, and its rate."""

    grad_norm: float
    applied: bool
    lr: float


def deepspeed_config(recipe: Recipe, elements: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a recipe and a model of `elements` parameters.

    bfloat16 gradients are accumulated and reduced in float32. DeepSpeed's stage 0 cannot do that, so that
    bfloat16 starts at stage 1, which differs from stage 0 only in splitting the optimizer's state.
    """
    stage = recipe.effective_zero_stage
    bucket = min(-(-elements // BUCKET_ALIGNMENT) * BUCKET_ALIGNMENT, MAX_BUCKET_ELEMENTS)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Stage 0 in float32 neither checks for NaN nor tells the norm: the engine below clips by itself.
        "gradient_clipping": recipe.learner.max_grad_norm if stage else 0.0,
        "steps_per_print": None,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "zero_allow_untested_optimizer": True,
        # It waits for the whole device at every micro-batch, and so for the NCCL kernel of a weight link whose actor died.
        "timers": {"throughput": {"enabled": False}},
    }
    if recipe.model.dtype == "bfloat16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    return config


def adamw(policy: PolicyModel, settings: LearnerSection) -> torch.optim.Optimizer:
    """AdamW over what is trained; the value head has a learning rate of its own."""
    head = [] if policy.value_head is None else list(policy.value_head.parameters())
    in_head = {id(parameter) for parameter in head}
    body = [p for p in policy.parameters() if p.requires_grad and id(p) not in in_head]
    groups = [{"params": body, "lr": settings.lr}]
    if head:
        groups.append({"params": head, "lr": settings.critic_lr})
    return torch.optim.AdamW(
        groups, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay, fused=True
    )


class Engine:
    """A policy that can be evaluated and updated; all methods are collective over the ranks.

    Args:
        policy: in the recipe's dtype; handed over, read weights through `policy` only where ZeRO is below 3.
        recipe: of the run.
        ranks: the data-parallel ranks.
        total_updates: optimizer steps of the whole run, for the schedule.
        optimizer: replaces AdamW (tests).
    """

    def __init__(
        self,
        policy: PolicyModel,
        recipe: Recipe,
        ranks: Ranks,
        total_updates: int,
        optimizer: Callable[[PolicyModel, LearnerSection], torch.optim.Optimizer] = adamw,
    ) -> None:
        self.ranks = ranks
        self.temperature = recipe.rollout.temperature
        self._limit = recipe.learner.max_grad_norm
        self._stage = recipe.effective_zero_stage
        self._skipped = 0
        policy.to(ranks.device)
        client = optimizer(policy, recipe.learner)
        factor = lr_factor(recipe.learner.schedule, recipe.learner.warmup_steps, total_updates)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(client, factor)
        config = deepspeed_config(recipe, sum(p.numel() for p in policy.parameters()))
        self.deepspeed, *_ = load_deepspeed().initialize(
            model=policy, optimizer=client, lr_scheduler=self.scheduler, config=config
        )
        bound_all_groups(recipe.learner.collective_timeout_s)

    @property
    def policy(self) -> PolicyModel:
        """The module under the engine."""
        return self.deepspeed.module

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        return self.scheduler.get_last_lr()[0]

    @torch.no_grad()
    def evaluate(self, batch: PackedBatch, temperature: float | None = None) -> Outputs:
        """Forward pass without gradient; every rank must call it equally often (ZeRO-3 gathers).

        Args:
            temperature: of the log-probabilities; None takes that of sampling.
        """
        return self.deepspeed(batch.to(self.ranks.device), temperature or self.temperature)

    def update(self, batches: Sequence[PackedBatch], loss: Callable[[int, Outputs], Tensor]) -> Update:
        """One optimizer step.

        Args:
            batches: this rank's micro-batches, equally many on every rank, fillers included.
            loss: called with a micro-batch's number and outputs; returns its part of the step's loss, a sum.

        Raises:
            RunFailedError: the gradient was not finite several times in a row.
        """
        for number, last in _numbered(len(batches)):
            self.deepspeed.set_gradient_accumulation_boundary(last)
            outputs = self.deepspeed(batches[number].to(self.ranks.device), self.temperature)
            part = loss(number, outputs)
            # DeepSpeed averages over ranks: times the world makes it the sum.
            self.deepspeed.backward(part * self.ranks.world, scale_wrt_gas=False)
        rate = self.lr
        norm, applied = self._step() if self._stage else self._step_unsharded()
        self._count_skipped(norm, applied)
        return Update(norm, applied, rate)

    def _step(self) -> tuple[float, bool]:
        self.deepspeed.step()
        return float(self.deepspeed.get_global_grad_norm()), bool(self.deepspeed.was_step_applied())

    def _step_unsharded(self) -> tuple[float, bool]:
        parameters = [p for p in self.policy.parameters() if p.grad is not None]
        norm = float(nn.utils.clip_grad_norm_(parameters, self._limit))
        if math.isfinite(norm):
            self.deepspeed.step()
        else:
            self.deepspeed.zero_grad()
        return norm, math.isfinite(norm)

    def _count_skipped(self, norm: float, applied: bool) -> None:
        self._skipped = 0 if applied else self._skipped + 1
        if applied:
            return
        log.warning("skipped an optimizer step: the gradient norm is %s", norm)
        if self._skipped >= MAX_SKIPPED_IN_A_ROW:
            raise RunFailedError(
                f"the learner's gradient was not finite {self._skipped} times in a row: "
                "lower learner.lr or look at the last batches"
            )

    def close(self) -> None:
        """Free what DeepSpeed holds."""
        self.deepspeed.destroy()


def _numbered(count: int) -> Iterator[tuple[int, bool]]:
    return ((number, number == count - 1) for number in range(count))
