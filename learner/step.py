"""The policy iteration step: a batch of complete groups becomes `batch.optimizer_steps` updates of the policy.

Invariant (design, I5): what an update does depends on the responses scheduled for it and on nothing else: not on
micro-batches, packing, ranks, or on whether groups without variance were sent. Advantages were computed on
complete groups before the responses were permuted (I7).

Some objectives must know the policy as it stands before the first update: log π_prox (anchor `proximal`), values
(GAE), the reference model's log-probabilities (KL), the second moment (M2PO). For these the step begins with a
pass without gradient over all rows; for Dr. GRPO against the behaviour policy there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from learner.batch import Row
from learner.engine import Engine, Outputs, Update
from learner.logprobs import PolicyModel
from learner.mismatch import Mismatch
from learner.objectives import Objective, TokenMetrics, kl
from learner.objectives.gae import gae, token_rewards
from learner.objectives.segments import segment_sum

PreparedUpdate = Sequence[Row]


class StepResult(NamedTuple):
    """Sums over all ranks, and one record per optimizer step."""

    tokens: TokenMetrics
    mismatch: Mismatch
    updates: list[Update]


class PolicyStep:
    """Carries out steps; every method is collective over the ranks.

    Args:
        engine: holds the policy.
        objective: of the recipe.
        reference: frozen base model, required where the objective says so.
        on_progress: called after each optimizer update, and after each row of the pass before the first.
    """

    def __init__(
        self,
        engine: Engine,
        objective: Objective,
        reference: PolicyModel | None = None,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._objective = objective
        self._reference = reference
        self._on_progress = on_progress
        self._ranks = engine.ranks

    def run(self, updates: Sequence[PreparedUpdate], rewards: Tensor, first_pass: int) -> StepResult:
        """Train on one batch.

        Args:
            updates: for each optimizer step, this rank's rows; equally many on every rank.
            rewards: [groups, G] of the whole batch, all ranks.
            first_pass: how many of `updates` make up the first epoch, in which each response occurs once.

        Raises:
            RunFailedError: the gradient was not finite several times in a row.
        """
        device = self._ranks.device
        mismatch, metrics = Mismatch.zero(device), TokenMetrics.zero(device)
        surveyed = self._needs_survey(len(updates))
        if surveyed:
            updates = self._survey(updates, rewards, first_pass, mismatch)
        done = []
        for number, rows in enumerate(updates):
            meter = mismatch if number == 0 and not surveyed else None
            loss = UpdateLoss(self._objective, rows, device, self._step_limit(rows), meter)
            done.append(self._engine.update([row.batch for row in rows], loss))
            metrics = metrics + loss.metrics
            self._on_progress()
        return StepResult(self._sum_metrics(metrics), self._sum_mismatch(mismatch), done)

    # --- the pass before the first update ---------------------------------------------------------------

    def _needs_survey(self, updates: int) -> bool:
        objective = self._objective
        proximal = objective.anchor == "proximal" and updates > 1
        return proximal or objective.needs_reference or objective.needs_values or objective.needs_step_limit

    def _survey(
        self, updates: Sequence[PreparedUpdate], rewards: Tensor, first_pass: int, mismatch: Mismatch
    ) -> list[list[Row]]:
        """Evaluate all rows at the weights of the step's start and fill in what the objective needs."""
        surveyed = []
        for number, rows in enumerate(updates):
            surveyed.append([self._survey_row(row) for row in rows])
            for row in surveyed[-1] if number < first_pass else ():
                mismatch.add(row.tokens.prox_logp, row.tokens.behaviour_logp, row.current)
        if self._objective.needs_values:
            return [[self._with_gae(row, rewards.flatten()) for row in rows] for rows in surveyed]
        if self._objective.kl_in_reward > 0:
            advantages = self._penalised_advantages(surveyed[:first_pass], rewards)
            return [[_with_advantages(row, advantages) for row in rows] for rows in surveyed]
        return surveyed

    def _survey_row(self, row: Row) -> Row:
        logp, _, values = self._engine.evaluate(row.batch)
        tokens = row.tokens.to(self._ranks.device)
        reference = None
        if self._reference is not None:
            batch = row.batch.to(self._ranks.device)
            with torch.no_grad():
                reference, _, _ = self._reference(batch, self._engine.temperature)
        self._on_progress()
        tokens = replace(tokens, prox_logp=logp, old_values=values, ref_logp=reference)
        return row._replace(tokens=tokens, current=row.current.to(self._ranks.device))

    def _with_gae(self, row: Row, rewards: Tensor) -> Row:
        tokens, lengths = row.tokens, row.batch.response_lengths
        if row.batch.is_filler:
            return row._replace(tokens=replace(tokens, returns=tokens.old_values))
        assert tokens.old_values is not None  # the value head's, which `_survey_row` filled in
        penalties = None
        if self._objective.kl_in_reward > 0:
            penalties = kl.token_penalties(
                self._objective.kl_in_reward, tokens.behaviour_logp, tokens.ref_logp
            ).cpu()
        earned = token_rewards(rewards[list(row.batch.samples)], lengths, penalties)
        advantages, returns = gae(
            earned, tokens.old_values.cpu(), lengths, self._objective.gamma, self._objective.lam
        )
        device = self._ranks.device
        return row._replace(
            tokens=replace(tokens, advantages=advantages.to(device), returns=returns.to(device))
        )

    def _penalised_advantages(self, updates: Sequence[Sequence[Row]], rewards: Tensor) -> Tensor:
        """Group advantages of R − β Σ_t log μ/π_ref: members of a group may live on different ranks."""
        penalties = torch.zeros(rewards.numel(), dtype=torch.float64)
        for row in (row for rows in updates for row in rows if not row.batch.is_filler):
            tokens = row.tokens
            per_token = kl.token_penalties(
                self._objective.kl_in_reward, tokens.behaviour_logp, tokens.ref_logp
            )
            sums = segment_sum(per_token.double(), tokens.sequence, tokens.count)
            penalties[list(row.batch.samples)] = sums.cpu()
        self._ranks.sum(penalties)
        return self._objective.advantages(rewards + penalties.view_as(rewards).float()).flatten()

    def _step_limit(self, rows: Sequence[Row]) -> float | None:
        if not self._objective.needs_step_limit:
            return None
        trained = [row.tokens.trained_only() for row in rows]
        parts = [(tokens.prox_logp - tokens.behaviour_logp).cpu() for tokens in trained]
        return self._objective.step_limit(torch.cat(self._ranks.gather(torch.cat(parts))))

    # --- sums over ranks --------------------------------------------------------------------------------

    def _sum_metrics(self, metrics: TokenMetrics) -> TokenMetrics:
        return TokenMetrics(self._ranks.sum(metrics.sums.cpu()), self._ranks.max(metrics.maxima.cpu()))

    def _sum_mismatch(self, mismatch: Mismatch) -> Mismatch:
        return Mismatch(self._ranks.sum(mismatch.sums.cpu()), self._ranks.max(mismatch.largest.cpu()))


def _with_advantages(row: Row, advantages: Tensor) -> Row:
    spread = row.batch.per_token(advantages).to(row.tokens.weights.device)
    return row._replace(tokens=replace(row.tokens, advantages=spread))


class UpdateLoss:
    """The loss of one optimizer step, called by the engine once per micro-batch.

    Attributes:
        metrics: additive metrics of the micro-batches so far.
    """

    def __init__(
        self,
        objective: Objective,
        rows: Sequence[Row],
        device: torch.device,
        step_limit: float | None,
        mismatch: Mismatch | None,
    ) -> None:
        self._objective = objective
        self._rows = rows
        self._device = device
        self._step_limit = step_limit
        self._mismatch = mismatch
        self.metrics = TokenMetrics.zero(device)

    def __call__(self, number: int, outputs: Outputs) -> Tensor:
        logp, entropy, values = outputs
        row = self._rows[number]
        tokens = row.tokens.to(self._device)
        if self._mismatch is not None:
            self._mismatch.add(logp.detach(), tokens.behaviour_logp, row.current.to(self._device))
        loss, metrics = self._objective.token_loss(
            logp, tokens, entropy=entropy.detach(), values=values, step_limit=self._step_limit
        )
        self.metrics = self.metrics + metrics
        return loss
