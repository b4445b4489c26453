"""`slipstream run RECIPE --resume` reads the recipe again; what that changes is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.recipe import load_recipe
from deploy import run
from deploy.folder import RECIPE_FILE, prepare


def test_settings_of_an_earlier_start_that_are_not_given_again_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = f"run.root='{tmp_path}'"
    folder = prepare(load_recipe("demo", [root, "learner.lr=0.5"]), resume=False, fresh=False)
    run._say_what_changes(load_recipe("demo", [root]))
    said = capsys.readouterr().out.splitlines()
    lr = load_recipe("demo").learner.lr
    assert said == [
        f"resumed with learner.lr = {lr}; until now 0.5",
        f"to go on with everything as it was: slipstream run {folder / RECIPE_FILE} --resume",
    ]
    run._say_what_changes(load_recipe(folder / RECIPE_FILE))
    assert capsys.readouterr().out == "", "the folder's own recipe keeps everything"


def test_a_recipe_of_another_release_is_no_obstacle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe("demo", [f"run.root='{tmp_path}'"])
    folder = prepare(recipe, resume=False, fresh=False)
    (folder / RECIPE_FILE).write_text("[launch]\nno_such_setting = 1\n")
    run._say_what_changes(recipe)
    assert "cannot be compared: " in capsys.readouterr().out
