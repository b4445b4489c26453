"""What `slipstream run` prints: foreign text as it is, and at the end what there is and where."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.recipe import Recipe
from deploy.display import Display
from deploy.report import write_summary
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


@pytest.mark.parametrize(
    ("status", "reason", "steps", "why"),
    [
        ("finished", "finished", 5, None),
        ("finished", "finished", 3, "its questions ran out before step 5"),
        ("stopped", "slipstream stop", 3, "slipstream stop"),
    ],
)
def test_the_table_at_the_end_says_where_the_model_is_and_why_it_ended(
    recipe: Recipe,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    status: str,
    reason: str,
    steps: int,
    why: str | None,
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    for step in (2, 10):
        model = recipe.folder / "checkpoints" / f"step-{step:06d}" / "hf"
        model.mkdir(parents=True)
        (model / "config.json").touch()
    write_summary(
        recipe.folder, {"status": status, "reason": reason, "steps": steps, "ledger": {"leased": 1}}
    )
    Display(recipe, recipe.folder, quiet=True).print_summary(recipe.folder)
    table = capsys.readouterr().out
    assert f"{recipe.folder}/checkpoints/step-000010/hf" in table
    assert ("why it ended" in table) == (why is not None)
    assert why is None or why in table
