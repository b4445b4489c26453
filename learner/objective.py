"""The objective that a recipe names.

Invariant: parts that do not go together are refused before anything starts; nothing is replaced in silence.
"""

from __future__ import annotations

from common.recipe.schema import Recipe
from learner.objectives import Objective, preset


def objective_of(recipe: Recipe) -> Objective:
    """The recipe's objective: its preset with the settings that replace parts of it.

    Raises:
        UserError: parts that do not go together.
    """
    settings = recipe.algorithm
    chosen = {
        "advantage": settings.advantage,
        "loss": settings.loss,
        "anchor": settings.anchor,
        "correction": settings.correction,
        "aggregation": settings.aggregation,
        "clip_low": settings.clip_low,
        "clip_high": settings.clip_high,
        "dual_clip": settings.dual_clip,
        "correction_floor": settings.correction_floor,
        "correction_cap": settings.correction_cap,
    }
    return preset(
        settings.preset,
        normaliser=recipe.normaliser,
        second_moment=settings.second_moment,
        kl_beta=settings.kl_beta,
        kl_estimator=settings.kl_estimator,
        kl_in_reward=settings.kl_in_reward,
        gamma=settings.gamma,
        lam=settings.lam,
        value_clip=settings.value_clip,
        value_coefficient=settings.value_coefficient,
        **{name: value for name, value in chosen.items() if value is not None},
    )
