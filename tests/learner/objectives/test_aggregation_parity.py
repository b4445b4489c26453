"""Aggregations and whole losses against formulas written independently, in the padded style of other trainers."""

from __future__ import annotations

import pytest
import torch

from common.errors import UserError
from learner.objectives import Objective, ResponseTokens, StepSize, sequence_weights

LENGTHS = [3, 7, 1, 5]
BUDGET = 9
GENERATOR = torch.Generator().manual_seed(3)


def padded_batch():
    """[B, W] tensors with a mask, W above every length, junk where masked."""
    shape = (len(LENGTHS), max(LENGTHS) + 2)
    mask = torch.arange(shape[1])[None] < torch.tensor(LENGTHS)[:, None]
    old = -2 + 0.5 * torch.randn(shape, generator=GENERATOR, dtype=torch.float64)
    logp = old + 0.4 * torch.randn(shape, generator=GENERATOR, dtype=torch.float64)
    ref = old + 0.4 * torch.randn(shape, generator=GENERATOR, dtype=torch.float64)
    advantages = torch.tensor([1.0, -0.5, 0.25, -0.75], dtype=torch.float64)
    return logp.requires_grad_(), old, ref, advantages, mask


def packed_loss(objective: Objective, logp, old, ref, advantages, mask):
    """The same batch through our code: padding removed, tokens end to end."""
    sequence = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    weights = objective.weights(torch.tensor(LENGTHS), StepSize(len(LENGTHS), sum(LENGTHS))).double()
    tokens = ResponseTokens(
        sequence=sequence,
        count=len(LENGTHS),
        weights=weights[sequence],
        advantages=advantages[sequence],
        behaviour_logp=old[mask],
        ref_logp=ref[mask] if objective.needs_reference else None,
    )
    return objective.token_loss(logp[mask], tokens)[0]


def trl_style(loss_type, logp, old, ref, advantages, mask, *, beta, low, high, max_completion_length):
    coef_1 = torch.exp(logp - old)
    coef_2 = torch.clamp(coef_1, 1 - low, 1 + high)
    loss = -torch.min(coef_1 * advantages[:, None], coef_2 * advantages[:, None])
    loss = loss + beta * (torch.exp(ref - logp) - (ref - logp) - 1)
    if loss_type == "grpo":
        return ((loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    if loss_type == "bnpo":
        return (loss * mask).sum() / mask.sum().clamp(min=1.0)
    return (loss * mask).sum() / (loss.size(0) * max_completion_length)


@pytest.mark.parametrize(
    ("aggregation", "loss_type"), [("response_mean", "grpo"), ("token_mean", "bnpo"), ("constant", "dr_grpo")]
)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_equals_the_padded_group_trainer_style(aggregation, loss_type, beta):
    batch = padded_batch()
    objective = Objective(
        aggregation=aggregation, normaliser=BUDGET, kl_beta=beta, clip_low=0.2, clip_high=0.28
    )
    ours = packed_loss(objective, *batch)
    theirs = trl_style(loss_type, *batch, beta=beta, low=0.2, high=0.28, max_completion_length=BUDGET)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(loss, batch[0])[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-12)
    assert not gradients[0][~batch[-1]].any()


def verl_style(mode, logp, old, advantages, mask, *, low, high, clip_c, scale):
    ratio = torch.exp(torch.clamp(logp - old, -20, 20))
    adv = advantages[:, None]
    losses_1, losses_2 = -adv * ratio, -adv * torch.clamp(ratio, 1 - low, 1 + high)
    clipped = torch.maximum(losses_1, losses_2)
    losses = torch.where(adv < 0, torch.min(-adv * clip_c, clipped), clipped)
    if mode == "token-mean":
        return (losses * mask).sum() / mask.sum()
    if mode == "seq-mean-token-mean":
        return ((losses * mask).sum(-1) / mask.sum(-1)).mean()
    return (losses * mask).sum(-1).mean() / scale  # seq-mean-token-sum-norm


@pytest.mark.parametrize(
    ("aggregation", "mode"),
    [
        ("token_mean", "token-mean"),
        ("response_mean", "seq-mean-token-mean"),
        ("constant", "seq-mean-token-sum-norm"),
    ],
)
def test_equals_the_padded_dual_clip_style(aggregation, mode):
    logp, old, ref, advantages, mask = padded_batch()
    objective = Objective(aggregation=aggregation, normaliser=BUDGET, dual_clip=1.3)
    ours = packed_loss(objective, logp, old, ref, advantages, mask)
    theirs = verl_style(mode, logp, old, advantages, mask, low=0.2, high=0.2, clip_c=1.3, scale=BUDGET)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(loss, logp)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-12)


def test_dropped_groups_leave_the_constant_weight_alone():
    """Trap: dividing by the responses that are left raises the learning rate as groups lose their variance."""
    full = sequence_weights("constant", torch.tensor(LENGTHS), StepSize(64, sum(LENGTHS)), BUDGET)
    fewer = sequence_weights("constant", torch.tensor(LENGTHS[:2]), StepSize(64, sum(LENGTHS[:2])), BUDGET)
    assert torch.equal(full[:2], fewer)


def test_a_step_of_nothing_is_refused():
    with pytest.raises(ValueError, match="responses"):
        StepSize(0, 0)


def test_unknown_aggregation_lists_the_valid_ones():
    with pytest.raises(UserError, match="constant, response_mean, token_mean"):
        sequence_weights("mean", torch.ones(1), StepSize(1, 1), 1)
