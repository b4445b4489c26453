"""The objective that a recipe names.

Invariant: parts that do not go together are refused before anything starts; nothing is replaced or dropped in silence.
"""

from __future__ import annotations

from common.errors import UserError
from common.recipe.presets import parts_of
from common.recipe.schema import Recipe
from learner.objectives import Objective, preset


def objective_of(recipe: Recipe) -> Objective:
    """The recipe's objective: its preset with the settings that replace parts of it.

    Raises:
        UserError: parts that do not go together, or a setting that none of them reads.
    """
    settings = recipe.algorithm
    objective = preset(
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
        **parts_of(settings),
    )
    if settings.normaliser is not None and objective.aggregation != "constant":
        raise UserError(
            f"has no effect with algorithm.aggregation = {objective.aggregation!r}: leave it out",
            setting="algorithm.normaliser",
        )
    return objective
