"""Generalised advantage estimation and the value loss of PPO, on packed response tokens.

Source: arXiv 1506.02438 (GAE), arXiv 1707.06347 (PPO). The paper runs γ = λ = 1, with a value clip of 0.2.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_rewards(rewards: Tensor, lengths: Tensor, penalties: Tensor | None = None) -> Tensor:
    """The outcome reward on the last token of each response, plus optional per-token penalties.

    Args:
        rewards: [n]; lengths: [n] int64, each ≥ 1, summing to T; penalties: [T] or None.

    Returns:
        [T], responses one after another.
    """
    total = int(lengths.sum())
    result = (
        torch.zeros(total, dtype=rewards.dtype, device=rewards.device) if penalties is None else penalties
    )
    return result.index_add(0, lengths.cumsum(0) - 1, rewards.to(result.dtype))


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages A_t = Σ_k (γλ)^k δ_{t+k}, δ_t = r_t + γ V_{t+1} − V_t, with V = 0 after the last token.

    A response that was cut at the budget ends its episode like any other (the paper's token-level MDP).

    Args:
        rewards, values: [T], responses one after another; V_t is of the state before token t.
        lengths: [n] int64, each ≥ 1, summing to T.

    Returns:
        (advantages [T], returns [T] = advantages + values), without gradient.
    """
    values = values.detach()
    last = torch.zeros_like(values, dtype=torch.bool)
    last[lengths.cumsum(0) - 1] = True
    following = torch.where(last, 0.0, values.roll(-1))
    delta = rewards + gamma * following - values
    advantages = _discounted_to_end(delta, lengths, gamma * lam)
    return advantages, advantages + values


def _discounted_to_end(delta: Tensor, lengths: Tensor, decay: float) -> Tensor:
    """Σ_k decay^k δ_{t+k} within each response; one step of the loop serves all responses."""
    ends = lengths.cumsum(0)
    result = delta.clone()
    for back in range(2, int(lengths.max()) + 1 if len(lengths) else 0):
        token = (ends - back)[lengths >= back]
        result[token] += decay * result[token + 1]
    return result


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """½ max((V − R)², (clip(V, V_old ± clip) − R)²) per token [T]; `clip` None leaves the plain square."""
    loss = (values - returns).square()
    if clip is not None:
        held = old_values + (values - old_values).clamp(-clip, clip)
        loss = torch.maximum(loss, (held - returns).square())
    return 0.5 * loss
