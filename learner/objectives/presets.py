"""Objectives by the names that a recipe may give them; the table is `common.recipe.presets`."""

from __future__ import annotations

from typing import Any

from common.recipe.presets import PRESETS
from learner.objectives.choices import check_choice
from learner.objectives.objective import Objective


def preset(name: str, **overrides: Any) -> Objective:
    """The objective called `name`, with some fields replaced.

    Raises:
        UserError: unknown name (the message lists all), or fields that do not go together.
    """
    check_choice("algorithm.preset", name, PRESETS)
    return Objective(**{**PRESETS[name], **overrides})
