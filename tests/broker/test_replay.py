"""A recorded run, served again to a learner alone."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from broker.main import serve
from common.errors import UserError
from tests.scripted.actor import ScriptedActor
from tests.scripted.broker import running_broker, scripted_recipe
from tests.scripted.learner import ScriptedLearner


def train(folder: Path, address: str, actors: int) -> ScriptedLearner:
    folder.mkdir(exist_ok=True)
    learner = ScriptedLearner(address, folder / "checkpoint.json", step_s=0.0)
    workers = [learner, *(ScriptedActor(address, f"actor-{i}", seed=i) for i in range(actors))]
    threads = [threading.Thread(target=worker.run, daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
        assert not thread.is_alive()
    return learner


@pytest.mark.parametrize("record", [True, False])
def test_a_recording_gives_the_same_batches_again(tmp_path: Path, record: bool) -> None:
    recipe = scripted_recipe(tmp_path, run={"steps": 6}, broker={"durability": "journal", "record": record})
    with running_broker(recipe) as address:
        first = train(tmp_path / "first", address, actors=2)
    again = recipe.model_copy(update={"run": recipe.run.model_copy(update={"name": "again"})})
    if not record:
        with pytest.raises(UserError, match=r"--replay: .*record one with broker\.record = true"):
            serve(again, run_folder=again.folder, replay=recipe.folder, stop_event=threading.Event())
        return
    with running_broker(again, replay=recipe.folder) as address:
        second = train(tmp_path / "second", address, actors=0)
    assert second.history == first.history
    assert second.batches == first.batches


def test_what_is_no_recording_is_said_to_be_none(tmp_path: Path) -> None:
    recipe = scripted_recipe(tmp_path)
    with pytest.raises(UserError, match="--replay: .*holds no journal"):
        serve(recipe, run_folder=recipe.folder, replay=tmp_path / "nothing", stop_event=threading.Event())
