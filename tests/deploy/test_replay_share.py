"""What a replay's learner may use: as much as the recorded one, or what there is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from common.recipe import Recipe
from deploy.launch.layout import share_out
from deploy.launch.machine import this_machine
from deploy.replay import _take_learners_share
from tests.scripted.broker import scripted_recipe


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment as `deploy.replay` sees it."""
    values: dict[str, str] = {}
    monkeypatch.setattr("deploy.replay.os", SimpleNamespace(environ=values))
    return values


def on(tmp_path: Path, device: str) -> Recipe:
    return scripted_recipe(tmp_path, launch={"device": device}, learner={"ranks": 1})


def test_threads_are_those_that_the_launcher_gives(tmp_path: Path, environment: dict[str, str]) -> None:
    recipe = on(tmp_path, "cpu")
    environment["MKL_NUM_THREADS"] = "7"
    _take_learners_share(recipe)
    wanted = share_out(recipe, *this_machine()).learner.environment()
    assert environment == wanted | {"MKL_NUM_THREADS": "7"}, "what the environment says stays"


def test_a_record_of_a_bigger_machine_is_replayed_with_what_there_is(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.replay.this_machine", lambda: ([0, 1], []))
    _take_learners_share(on(tmp_path, "gpu"))
    assert not environment
