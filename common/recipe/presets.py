"""Named objectives: the paper's methods and ablations, and Dr. GRPO's variants for stale data.

Invariant: a preset is only a set of fields of the objective (`learner.objectives.Objective`); a recipe may replace any
of them, and what an objective implies for the other programs is worked out here from the fields, never from names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from common.recipe.schema import AlgorithmSection

_BIASED = {"aggregation": "response_mean"}
_DECOUPLED = {"anchor": "proximal", "dual_clip": 3.0}

PRESETS: dict[str, dict[str, Any]] = {
    # The paper: section 3, Fig. 8 (ablations), appendix A (rloo).
    "dr_grpo": {},
    "grpo": {"advantage": "grpo", **_BIASED},
    "wo_len": {"advantage": "grpo"},  # GRPO without the length term
    "wo_std": {**_BIASED},  # GRPO without the standard deviation
    "rloo": {"advantage": "rloo"},
    "ppo": {"advantage": "gae"},
    "reinforce": {"advantage": "none", "loss": "reinforce"},
    # For data several policy versions old.
    "dr_grpo_dual_clip": {"dual_clip": 3.0},
    "dr_grpo_tis": {**_DECOUPLED, "correction": "tis"},
    "dr_grpo_icepop": {**_DECOUPLED, "correction": "icepop"},
    "dr_grpo_sequence_mask": {**_DECOUPLED, "correction": "sequence_mask"},
    "dr_grpo_geometric_mask": {**_DECOUPLED, "correction": "geometric_mask"},
    "dr_grpo_m2po": {**_DECOUPLED, "correction": "m2po"},
    "dr_grpo_cispo": {"loss": "cispo"},
    "dr_grpo_gspo": {"loss": "gspo"},
}
REPLACEABLE = (
    "advantage",
    "loss",
    "anchor",
    "correction",
    "aggregation",
    "clip_low",
    "clip_high",
    "dual_clip",
    "correction_floor",
    "correction_cap",
)
GROUP_BASELINES = ("dr_grpo", "grpo", "rloo")


def parts_of(algorithm: AlgorithmSection) -> dict[str, Any]:
    """Fields of the objective that the preset or the recipe sets; the others have the objective's defaults."""
    replaced = {name: getattr(algorithm, name) for name in REPLACEABLE}
    return PRESETS[algorithm.preset] | {name: value for name, value in replaced.items() if value is not None}


def has_group_baseline(algorithm: AlgorithmSection) -> bool:
    """Whether advantages are relative to the group, so that equal rewards say nothing."""
    return parts_of(algorithm).get("advantage", "dr_grpo") in GROUP_BASELINES


def equal_rewards_are_neutral(algorithm: AlgorithmSection) -> bool:
    """Whether a group of equal rewards leaves the gradient as it is, so that it need not be sent.

    Beside a zero advantage that takes an aggregation and a correction in which its tokens do not count for the
    others' weights, and no KL term.
    """
    parts = parts_of(algorithm)
    return (
        has_group_baseline(algorithm)
        and parts.get("aggregation") != "token_mean"
        and parts.get("correction") != "m2po"
        and not algorithm.kl_beta
        and not algorithm.kl_in_reward
    )
