"""Exact enumeration over a tabular policy: which objective has the gradient of the expected reward?

The policy first picks a method (0 is right, 1 is wrong: reward 1 or 0), then at every step stops or goes on, up to
a budget. The reward does not depend on length, so the true gradient by the stop logits is 0; the stop comes after
the method, as in the paper's explanation of the length bias. Every group of G responses is enumerated with its
probability, and its gradient comes from the code that trains.

Expected (arXiv 2503.20783, appendix A; figures from enumeration): E[Dr. GRPO] = (G − 1)/G ∇J, E[RLOO] = ∇J.
"""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch

from learner.objectives import ResponseTokens, StepSize, preset

LONGEST = 3  # stop-or-go tokens
RESPONSES = [(method, stops) for method in (0, 1) for stops in range(1, LONGEST + 1)]
LENGTHS = torch.tensor([1 + stops for _, stops in RESPONSES])
REWARDS = torch.tensor([1.0 - method for method, _ in RESPONSES], dtype=torch.float64)


class Policy:
    """Logits [method; stop after the right method; stop after the wrong one], as log-odds of two-way choices."""

    def __init__(self, logits: tuple[float, float, float]) -> None:
        self.logits = torch.tensor(logits, dtype=torch.float64, requires_grad=True)

    def token_logps(self, method: int, stops: int) -> list[torch.Tensor]:
        """Log-probabilities of the tokens of one response; the stop at the budget is forced."""
        sign = 1.0 if method == 0 else -1.0
        tokens = [torch.nn.functional.logsigmoid(sign * self.logits[0])]
        stop = self.logits[1 + method]
        for step in range(1, stops + 1):
            forced = step == LONGEST
            choice = torch.nn.functional.logsigmoid(stop if step == stops else -stop)
            tokens.append(choice * (0.0 if forced else 1.0))
        return tokens

    def response_logps(self) -> torch.Tensor:
        return torch.stack([sum(self.token_logps(*response)) for response in RESPONSES])

    def gradient_of_expected_reward(self) -> torch.Tensor:
        expected = (self.response_logps().exp() * REWARDS).sum()
        return torch.autograd.grad(expected, self.logits)[0]


def expected_update(name: str, policy: Policy, size: int, **overrides: str) -> torch.Tensor:
    """−L × E over all groups of the gradient of the objective called `name`; L undoes the constant."""
    constant = float(LENGTHS.max())
    objective = preset(name, normaliser=constant, **overrides)
    with torch.no_grad():
        probabilities = policy.response_logps().exp()
    assert float(probabilities.sum()) == pytest.approx(1.0)
    groups = torch.tensor(list(itertools.product(range(len(RESPONSES)), repeat=size)))
    chance = probabilities[groups].prod(1)
    members = groups.flatten()
    advantages = objective.advantages(REWARDS[groups]).flatten()
    lengths = LENGTHS[members]
    weights = torch.cat(
        [
            objective.weights(LENGTHS[group], StepSize(size, int(LENGTHS[group].sum()))).double()
            for group in groups
        ]
    )
    sequence = torch.arange(len(members)).repeat_interleave(lengths)
    by_response = [torch.stack(policy.token_logps(*response)) for response in RESPONSES]
    logp = torch.cat([by_response[member] for member in members])
    tokens = ResponseTokens(
        sequence=sequence,
        count=len(members),
        weights=(weights * chance.repeat_interleave(size))[sequence],
        advantages=advantages[sequence],
        behaviour_logp=logp.detach(),
    )
    loss, _ = objective.token_loss(logp, tokens)
    return -constant * torch.autograd.grad(loss, policy.logits)[0]


LOGITS = (-0.8, 0.3, -0.4)


@cache
def update(name: str, size: int) -> torch.Tensor:
    return expected_update(name, Policy(LOGITS), size)


TRUE = Policy(LOGITS).gradient_of_expected_reward()


def test_the_true_gradient_does_not_want_any_length():
    assert float(TRUE[0]) > 0.1
    assert TRUE[1:].abs().max() < 1e-15


@pytest.mark.parametrize(("size", "factor"), [(2, 0.5), (3, 0.6667), (4, 0.75)])
def test_dr_grpo_has_the_true_gradient_scaled(size, factor):
    torch.testing.assert_close(update("dr_grpo", size), (size - 1) / size * TRUE, rtol=1e-6, atol=1e-9)
    assert float(update("dr_grpo", size)[0] / TRUE[0]) == pytest.approx(factor, abs=5e-5)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_rloo_has_the_true_gradient(size):
    torch.testing.assert_close(update("rloo", size), TRUE, rtol=1e-6, atol=1e-9)


def test_reinforce_without_baseline_has_the_true_gradient():
    torch.testing.assert_close(update("reinforce", 2), TRUE, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["grpo", "wo_std"])
@pytest.mark.parametrize("size", [3, 4])
def test_the_mean_over_a_response_shortens_right_answers_and_lengthens_wrong_ones(name, size):
    after_right, after_wrong = update(name, size)[1:].tolist()
    assert after_right > 1e-3
    assert after_wrong < -1e-3


@pytest.mark.parametrize("size", [3, 4])
def test_without_the_length_term_grpo_has_no_length_gradient_but_still_another_scale(size):
    gradient = update("wo_len", size)
    assert gradient[1:].abs().max() < 1e-8
    assert abs(float(gradient[0] / TRUE[0]) - (size - 1) / size) > 0.1


def test_the_standard_deviation_favours_extreme_questions():
    """Question-level difficulty bias: the scale against ∇J depends on how hard the question is."""

    def scale(name: str, logit: float) -> float:
        policy = Policy((logit, 0.3, -0.4))
        return float(expected_update(name, policy, 4)[0] / policy.gradient_of_expected_reward()[0])

    assert scale("dr_grpo", -4.0) == pytest.approx(scale("dr_grpo", 0.0), rel=1e-6)
    assert scale("wo_len", -4.0) > 1.05 * scale("wo_len", 0.0)


def test_token_mean_over_a_group_has_a_length_gradient_too():
    gradient = expected_update("dr_grpo", Policy(LOGITS), 3, aggregation="token_mean")
    assert gradient[1:].abs().max() > 1e-3
