"""One objective: an advantage, a loss, a ratio anchor, a correction and an aggregation, composed.

Invariant (design, I5): `Objective.token_loss` returns a *sum*; adding it over micro-batches and ranks gives the
loss of the optimizer step, however the tokens were split.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from common.errors import UserError
from learner.objectives import advantages as adv
from learner.objectives import corrections, kl, losses
from learner.objectives.aggregation import AGGREGATIONS, StepSize, sequence_weights
from learner.objectives.choices import check_choice, check_positive, check_range
from learner.objectives.gae import value_loss
from learner.objectives.metrics import TokenMetrics, token_metrics

ADVANTAGES = (*adv.GROUP_ADVANTAGES, "gae")
ANCHORS = ("behavior", "proximal")
BOUNDS = ("correction_floor", "correction_cap")
OF_GAE = ("gamma", "lam", "value_clip", "value_coefficient")


@dataclass(frozen=True, slots=True)
class ResponseTokens:
    """Everything about the T response tokens of a micro-batch that is known before its forward pass.

    Attributes:
        sequence: [T] int64, local response 0..count−1 of each token; responses are whole.
        count: responses in the micro-batch.
        weights: [T], `Objective.weights` spread over tokens.
        advantages: [T].
        behaviour_logp: [T], log μ as recorded by the actor (temperature applied).
        prox_logp: [T], log π_prox; None means π itself, which is exact on the first optimizer step after a batch
            was taken.
        ref_logp: [T], log π_ref; only if `Objective.needs_reference`.
        old_values, returns: [T]; only if `Objective.needs_values`.
        staleness: [T] int64, versions between sampling and training; metrics only.
        mask: [T] bool, False for tokens that are not trained on (masked truncated responses); None keeps all.
    """

    sequence: Tensor
    count: int
    weights: Tensor
    advantages: Tensor
    behaviour_logp: Tensor
    prox_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    old_values: Tensor | None = None
    returns: Tensor | None = None
    staleness: Tensor | None = None
    mask: Tensor | None = None

    def to(self, device: torch.device | str) -> ResponseTokens:
        """The same with its tensors on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def trained_only(self) -> ResponseTokens:
        """Without the masked tokens; nothing that they hold, not even NaN, can reach a loss or a metric."""
        if self.mask is None:
            return self
        keep = self.mask
        return replace(self._each(lambda tensor: tensor[keep]), mask=None)

    def _each(self, function: Callable[[Tensor], Tensor]) -> ResponseTokens:
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(
            self, **{name: function(value) for name, value in tensors.items() if isinstance(value, Tensor)}
        )


def _select(values: Tensor | None, mask: Tensor) -> Tensor | None:
    return None if values is None else values[mask]


@dataclass(frozen=True, slots=True)
class Objective:
    """The objective of a run; field by field what a recipe's `[algorithm]` says. The defaults are Dr. GRPO as in
    the paper (Table 6).

    Attributes:
        advantage: dr_grpo, grpo, rloo, none or gae.
        loss: ppo_clip, cispo, gspo or reinforce.
        anchor: denominator of the ratio: `behavior` μ (one forward pass) or `proximal` π_prox.
        correction: none, tis, icepop, sequence_mask, geometric_mask or m2po; others than none need `proximal`.
        aggregation: constant, response_mean or token_mean.
        normaliser: L of `constant`, in tokens; the paper's generation budget.
        clip_low, clip_high: trust region [1 − clip_low, 1 + clip_high]; None takes the loss's default.
        dual_clip: bound c > 1 on the loss of negative advantages (ppo_clip only); None leaves it out.
        correction_floor, correction_cap: bounds of ρ; None takes the correction's default.
        second_moment: τ of m2po.
        kl_beta: weight of the KL loss to a reference model; 0 needs no reference model.
        kl_estimator: k2 or k3, for that loss.
        kl_in_reward: weight of the KL penalty in the reward; 0 needs no reference model.
        gamma, lam: of gae.
        value_clip, value_coefficient: of the value loss; value_clip None leaves the clip out.

    Raises:
        UserError: on construction, for an unknown name (listing the valid ones), a number out of range, parts that
            do not go together, or a setting that none of the chosen parts reads.
    """

    advantage: str = "dr_grpo"
    loss: str = "ppo_clip"
    anchor: str = "behavior"
    correction: str = "none"
    aggregation: str = "constant"
    normaliser: float = 3000.0
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None
    correction_floor: float | None = None
    correction_cap: float | None = None
    second_moment: float = corrections.SECOND_MOMENT
    kl_beta: float = 0.0
    kl_estimator: str = "k3"
    kl_in_reward: float = 0.0
    gamma: float = 1.0
    lam: float = 1.0
    value_clip: float | None = 0.2
    value_coefficient: float = 1.0

    def __post_init__(self) -> None:
        check_choice("algorithm.advantage", self.advantage, ADVANTAGES)
        check_choice("algorithm.loss", self.loss, losses.LOSSES)
        check_choice("algorithm.anchor", self.anchor, ANCHORS)
        check_choice("algorithm.correction", self.correction, corrections.CORRECTIONS)
        check_choice("algorithm.aggregation", self.aggregation, AGGREGATIONS)
        check_choice("algorithm.kl_estimator", self.kl_estimator, kl.KL_ESTIMATORS)
        self._check_numbers()
        self._check_combination()

    def _check_numbers(self) -> None:
        check_positive("algorithm.normaliser", self.normaliser)
        low, high = self.clip
        check_range("algorithm.clip_low", low, 0, 1)
        check_range("algorithm.clip_high", high, 0)
        low, high = self.correction_bounds
        check_range("algorithm.correction_floor", low, 0)
        check_range("algorithm.correction_cap", high, low)
        for name in ("second_moment", "kl_beta", "kl_in_reward", "value_coefficient"):
            check_range(f"algorithm.{name}", getattr(self, name), 0)
        for name in ("gamma", "lam"):
            check_range(f"algorithm.{name}", getattr(self, name), 0, 1)
        if self.value_clip is not None:
            check_range("algorithm.value_clip", self.value_clip, 0)

    def _check_combination(self) -> None:
        if self.correction != "none" and self.anchor != "proximal":
            raise UserError(
                f"{self.correction!r} corrects π_prox / μ and needs algorithm.anchor = 'proximal'; with 'behavior' "
                "the ratio already is π / μ",
                setting="algorithm.correction",
            )
        for names, read, because in (
            (("clip_low", "clip_high"), self.loss != "reinforce", f"algorithm.loss = {self.loss!r}"),
            (("dual_clip",), self.loss == "ppo_clip", f"algorithm.loss = {self.loss!r}"),
            (BOUNDS, self.correction not in ("none", "m2po"), f"algorithm.correction = {self.correction!r}"),
            (("second_moment",), self.correction == "m2po", f"algorithm.correction = {self.correction!r}"),
            (("kl_estimator",), self.kl_beta > 0, "algorithm.kl_beta = 0"),
            (OF_GAE, self.advantage == "gae", f"algorithm.advantage = {self.advantage!r}"),
        ):
            if not read:
                self._check_unset(names, because)
        if self.dual_clip is not None and not self.dual_clip > 1 + self.clip[1]:
            raise UserError(
                f"must lie above the trust region's edge {1 + self.clip[1]:g}, not {self.dual_clip}",
                setting="algorithm.dual_clip",
            )

    def _check_unset(self, names: Collection[str], because: str) -> None:
        """Refuse a change of what nothing reads: it would be dropped in silence."""
        defaults = {field.name: field.default for field in fields(self)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                raise UserError(f"has no effect with {because}: leave it out", setting=f"algorithm.{name}")

    @property
    def clip(self) -> tuple[float, float]:
        """(clip_low, clip_high) with the loss's defaults filled in."""
        low, high = losses.DEFAULT_CLIP[self.loss]
        return (
            low if self.clip_low is None else self.clip_low,
            high if self.clip_high is None else self.clip_high,
        )

    @property
    def correction_bounds(self) -> tuple[float, float]:
        """(correction_floor, correction_cap) with the correction's defaults filled in."""
        low, high = corrections.DEFAULT_BOUNDS[self.correction]
        return (
            low if self.correction_floor is None else self.correction_floor,
            high if self.correction_cap is None else self.correction_cap,
        )

    @property
    def needs_reference(self) -> bool:
        """A frozen reference model has to be loaded."""
        return self.kl_beta > 0 or self.kl_in_reward > 0

    @property
    def needs_values(self) -> bool:
        """The policy needs a value head."""
        return self.advantage == "gae"

    @property
    def needs_step_limit(self) -> bool:
        """`step_limit` has to be computed before each optimizer step and handed to `token_loss`."""
        return self.correction == "m2po"

    def advantages(self, rewards: Tensor, names: Collection[str] | None = None) -> Tensor:
        """Advantages [groups, G] of complete groups; see `group_advantages`. For `gae` use `gae.gae`."""
        if self.advantage == "gae":
            raise ValueError("advantages of gae are per token: use learner.objectives.gae")
        return adv.group_advantages(self.advantage, rewards, names)

    def weights(self, lengths: Tensor, size: StepSize) -> Tensor:
        """Weight of the tokens of each response; see `sequence_weights`."""
        return sequence_weights(self.aggregation, lengths, size, self.normaliser)

    def step_limit(self, log_rho: Tensor) -> float | None:
        """What the correction needs from all tokens of the optimizer step; None for all but m2po.

        Args:
            log_rho: [T] log π_prox − log μ of all trained tokens of the step, over all ranks.
        """
        return corrections.second_moment_limit(log_rho, self.second_moment) if self.needs_step_limit else None

    def token_loss(
        self,
        logp: Tensor,
        tokens: ResponseTokens,
        *,
        entropy: Tensor | None = None,
        values: Tensor | None = None,
        step_limit: float | None = None,
    ) -> tuple[Tensor, TokenMetrics]:
        """Contribution of one micro-batch to the loss of the optimizer step.

        Args:
            logp: [T] log π of the response tokens, with gradient.
            entropy: [T], metrics only.
            values: [T] with gradient; required if `needs_values`.
            step_limit: from `step_limit`; required if `needs_step_limit`.

        Returns:
            (Σ_t weight_t × loss_t, a scalar to call backward on; additive metrics). T = 0 (a filler) gives an
            exact 0 that still reaches the parameters.
        """
        if tokens.mask is not None:
            logp, entropy, values = (_select(tensor, tokens.mask) for tensor in (logp, entropy, values))
            tokens = tokens.trained_only()
        prox_logp = logp.detach() if tokens.prox_logp is None else tokens.prox_logp
        policy = self._policy_loss(logp, prox_logp, tokens)
        correction = self._correction(prox_logp, tokens, step_limit)
        loss = policy.loss if correction is None else correction * policy.loss
        kl_reference = self._reference_kl(logp, tokens)
        if kl_reference is not None:
            loss = loss + self.kl_beta * kl_reference
        if self.needs_values:
            loss = loss + self.value_coefficient * value_loss(
                values, tokens.old_values, tokens.returns, self.value_clip
            )
        loss = loss * tokens.weights
        metrics = token_metrics(
            logp.detach() - tokens.behaviour_logp,
            policy,
            loss=loss.detach(),
            correction=correction,
            kl_reference=kl_reference,
            entropy=entropy,
            staleness=tokens.staleness,
        )
        return loss.sum(), metrics

    def _policy_loss(self, logp: Tensor, prox_logp: Tensor, tokens: ResponseTokens) -> losses.TokenLoss:
        log_ratio = logp - (tokens.behaviour_logp if self.anchor == "behavior" else prox_logp)
        low, high = self.clip
        if self.loss == "ppo_clip":
            return losses.ppo_clip(log_ratio, tokens.advantages, low, high, self.dual_clip)
        if self.loss == "cispo":
            return losses.cispo(log_ratio, tokens.advantages, low, high, logp)
        if self.loss == "gspo":
            return losses.gspo(log_ratio, tokens.advantages, low, high, tokens.sequence, tokens.count)
        return losses.reinforce(tokens.advantages, logp)

    def _correction(self, prox_logp: Tensor, tokens: ResponseTokens, limit: float | None) -> Tensor | None:
        if self.correction == "none":
            return None
        log_rho = prox_logp - tokens.behaviour_logp
        low, high = self.correction_bounds
        if self.correction == "tis":
            return corrections.tis(log_rho, low, high)
        if self.correction == "icepop":
            return corrections.icepop(log_rho, low, high)
        if self.correction == "m2po":
            if limit is None:
                raise ValueError("m2po needs step_limit, computed over all tokens of the optimizer step")
            return corrections.m2po(log_rho, limit)
        whole = (
            corrections.sequence_mask if self.correction == "sequence_mask" else corrections.geometric_mask
        )
        return whole(log_rho, low, high, tokens.sequence, tokens.count)

    def _reference_kl(self, logp: Tensor, tokens: ResponseTokens) -> Tensor | None:
        if self.kl_beta == 0 or tokens.ref_logp is None:
            if self.kl_beta > 0:
                raise ValueError("kl_beta > 0 needs ref_logp")
            return None
        return kl.kl_estimate(self.kl_estimator, logp, tokens.ref_logp)
