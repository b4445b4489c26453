"""A policy small enough for a table, on which the length bias acts as it does in a language model.

A response is a method, then filler until it stops: the first token decides whether the answer is right, every
later token only decides how long the response is. This order matters. Were length independent of correctness
given what is already written, advantages of a group would cancel whatever the weight 1/|o| (they sum to 0), and
there would be no bias to see.

Invariant: rewards do not depend on length (unless the budget cuts a response), so that any trend of the stop
decision comes from the objective.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from learner.objectives import Objective, ResponseTokens, StepSize, preset

BUDGET = 32  # tokens of a response: one for the method, then filler and the stop
GROUP = 8


@dataclass(frozen=True)
class Rollout:
    """Sampled responses, groups laid end to end; n = questions × G.

    `right` [n] bool (the method), `lengths` [n] int64 in tokens, `finished` [n] bool.
    """

    right: Tensor
    lengths: Tensor
    finished: Tensor

    @property
    def rewards(self) -> Tensor:
        """[questions, G]: 1 for a right method that came to an end within the budget."""
        return (self.right & self.finished).float().view(-1, GROUP)


class TabularPolicy(torch.nn.Module):
    """One logit per question for the right method; one logit per method for stopping, shared by all questions.

    Args:
        questions: their chances of the right method range evenly from 18 % to 82 %, so that groups differ in
            their standard deviation.
        stop: probability of stopping at each token, at first.
    """

    def __init__(self, questions: int, stop: float = 0.2) -> None:
        super().__init__()
        self.method = torch.nn.Parameter(torch.linspace(-1.5, 1.5, questions))
        self.stop = torch.nn.Parameter(torch.logit(torch.tensor([stop, stop])))

    @torch.no_grad()
    def sample(self, generator: torch.Generator) -> Rollout:
        """G responses to every question."""
        chance = torch.sigmoid(self.method).repeat_interleave(GROUP)
        right = torch.rand(chance.shape, generator=generator) < chance
        stop = torch.sigmoid(self.stop)[right.long()]
        uniform = torch.rand(chance.shape, generator=generator).clamp(min=1e-12)
        # Inverse transform of the geometric distribution: decisions up to and including the stop.
        decisions = torch.ceil(torch.log(uniform) / torch.log1p(-stop)).clamp(min=1).long()
        finished = decisions < BUDGET
        return Rollout(right, 1 + decisions.clamp(max=BUDGET - 1), finished)

    def logp(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """(log π of every token [T], response of every token [T]), with gradient."""
        count = len(rollout.lengths)
        sequence = torch.arange(count).repeat_interleave(rollout.lengths)
        starts = rollout.lengths.cumsum(0) - rollout.lengths
        position = torch.arange(len(sequence)) - starts[sequence]
        sign = torch.where(rollout.right, 1.0, -1.0)
        method = torch.nn.functional.logsigmoid(sign * self.method.repeat_interleave(GROUP))
        stops = rollout.finished[sequence] & (position == rollout.lengths[sequence] - 1)
        stop = self.stop[rollout.right.long()][sequence]
        decision = torch.nn.functional.logsigmoid(torch.where(stops, stop, -stop))
        return torch.where(position == 0, method[sequence], decision), sequence


def token_weights(objective: Objective, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """(advantage, weight) of each response's tokens, both [n]: what the objective multiplies ∇log π by."""
    size = StepSize(responses=len(rollout.lengths), tokens=int(rollout.lengths.sum()))
    return objective.advantages(rollout.rewards).flatten(), objective.weights(rollout.lengths, size)


def train(
    algorithm: str, seed: int, *, iterations: int, questions: int = 16, lr: float = 0.05
) -> list[dict[str, float | int | None]]:
    """Train a fresh policy with the learner's own objective.

    Returns:
        One row per iteration: step, reward, length, length_correct, length_incorrect (tokens; by method, None
        where there was no such response).
    """
    generator = torch.Generator().manual_seed(seed)
    policy = TabularPolicy(questions)
    objective = preset(algorithm, normaliser=BUDGET)
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr, betas=(0.9, 0.95))
    rows = []
    for step in range(iterations):
        rollout = policy.sample(generator)
        rows.append({"step": step, **_summary(rollout)})
        advantages, weights = token_weights(objective, rollout)
        logp, sequence = policy.logp(rollout)
        tokens = ResponseTokens(
            sequence=sequence,
            count=len(rollout.lengths),
            weights=weights[sequence],
            advantages=advantages[sequence],
            behaviour_logp=logp.detach(),
        )
        loss, _ = objective.token_loss(logp, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return rows


def _summary(rollout: Rollout) -> dict[str, float | None]:
    lengths = rollout.lengths.double()

    def average(chosen: Tensor) -> float | None:
        return float(lengths[chosen].mean()) if chosen.any() else None

    return {
        "reward": float(rollout.rewards.mean()),
        "length": float(lengths.mean()),
        "length_correct": average(rollout.right),
        "length_incorrect": average(~rollout.right),
    }
