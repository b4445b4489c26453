"""What `slipstream run` prints: foreign text as it is, and at the end what there is and where."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.recipe import Recipe
from deploy.display import Display
from tests.scripted.broker import scripted_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    found = scripted_recipe(tmp_path)
    found.folder.mkdir()
    return found


def test_what_others_wrote_is_shown_as_it_is(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    """rich would take brackets for its markup: [rank0] would be gone, and [/tmp/x] end the launcher."""
    said = "learner died ([rank0]: no file [/tmp/x] :boom:); starting it again"
    Display(recipe, recipe.folder, quiet=True).say(said)
    assert capsys.readouterr().out.strip() == said
    assert said in (recipe.folder / "run.log").read_text()
