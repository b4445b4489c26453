"""The question sets that a recipe names.

Invariant: broker, launcher and evaluation load the same rows in the same order from the same recipe.
"""

from __future__ import annotations

from common.errors import UserError
from common.recipe import Recipe
from common.tasks.sets import MissingFieldError, QuestionSet, load_questions


def training_questions(recipe: Recipe) -> QuestionSet:
    """The training set of `recipe.data`; raises UserError that names data.train."""
    data = recipe.data
    try:
        return load_questions(
            data.train,
            data_dir=data.data_dir,
            split=data.split,
            problem_field=data.problem_field,
            answer_field=data.answer_field,
            levels=data.levels,
            limit=data.limit,
            all_fields=_wants_all_fields(recipe),
        )
    except MissingFieldError as error:
        hint = f"name the right one in data.{error.role}_field"
        raise UserError(f"{error}: {hint}.", setting="data.train") from None
    except UserError as error:
        raise UserError(str(error), setting="data.train") from None


def held_out_questions(recipe: Recipe) -> dict[str, QuestionSet]:
    """The sets of `recipe.eval`, by name; raises UserError that names eval.sets."""
    try:
        return {
            name: load_questions(
                name,
                data_dir=recipe.data.data_dir,
                limit=recipe.eval.limit,
                all_fields=_wants_all_fields(recipe),
            )
            for name in recipe.eval.sets
        }
    except MissingFieldError as error:
        hint = f"sets of eval.sets have it under the name '{error.role}'"
        raise UserError(f"{error}: {hint}.", setting="eval.sets") from None
    except UserError as error:
        raise UserError(str(error), setting="eval.sets") from None


def _wants_all_fields(recipe: Recipe) -> bool:
    """Whether the reward is somebody's own, which may look at any field of a row."""
    return recipe.data.reward != "math"
