"""docs/recipes.md says what the schema says."""

from __future__ import annotations

from deploy.recipe_reference import PAGE, with_reference


def test_the_page_is_in_step_with_the_schema() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_reference(page) == page, "run: python -m deploy.recipe_reference"
