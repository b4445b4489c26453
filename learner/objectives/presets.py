"""Named objectives: the paper's methods and ablations, and Dr. GRPO's variants for stale data.

A preset is only a set of Objective fields; a recipe may override any of them.
"""

from __future__ import annotations

from typing import Any

from learner.objectives.choices import check_choice
from learner.objectives.objective import Objective

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


def preset(name: str, **overrides: Any) -> Objective:
    """The objective called `name`, with some fields replaced.

    Raises:
        UserError: unknown name (the message lists all), or fields that do not go together.
    """
    check_choice("algorithm.preset", name, PRESETS)
    return Objective(**{**PRESETS[name], **overrides})
