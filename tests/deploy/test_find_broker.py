"""A worker that is given a run waits for its broker, wherever it comes up, but not for one that never will."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from common.errors import UserError
from common.keys import make_keys
from common.recipe import resolved_toml
from deploy import workers
from deploy.workers import _find_broker
from tests.scripted.broker import running_broker, scripted_recipe


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(workers, "ASK_FOR_BROKER_S", 0.3)


def prepared(folder: Path, **sections):
    """A recipe and its prepared run folder."""
    recipe = scripted_recipe(folder, **sections)
    recipe.folder.mkdir()
    (recipe.folder / "recipe.toml").write_text(resolved_toml(recipe))
    return recipe


def test_a_broker_that_comes_later_is_found(tmp_path):
    recipe = prepared(tmp_path)
    found: list[tuple] = []
    looking = threading.Thread(target=lambda: found.append(_find_broker(None, str(recipe.folder), None)))
    looking.start()
    looking.join(1.0)
    assert looking.is_alive(), "nobody answers yet"
    with running_broker(recipe):
        looking.join(30.0)
    assert found == [(f"file:{(recipe.folder / 'broker.json').resolve()}", None)]


def test_the_broker_of_an_ended_run_is_not_waited_for(tmp_path, caplog):
    recipe = prepared(tmp_path)
    (recipe.folder / "broker.json").write_text('{"address": "127.0.0.1:9"}')
    end = recipe.folder / "metrics.jsonl"
    end.write_text('{"time": %f, "kind": "end", "step": 5, "values": {}}\n' % (time.time() + 1.0))
    with pytest.raises(UserError, match=r"--run: the run in .* has ended"):
        _find_broker(None, str(recipe.folder), None)
    assert "has ended; waiting" in caplog.text, "said before anybody waits"


def test_the_broker_of_a_run_that_goes_on_after_its_end_is_waited_for(tmp_path):
    """It was stopped in order, and prepared to go on: its broker has not written anything yet."""
    recipe = prepared(tmp_path)
    (recipe.folder / "metrics.jsonl").write_text('{"time": 1, "kind": "end", "step": 5, "values": {}}\n')
    assert not workers._has_ended(recipe.folder)


def test_unusable_keys_are_said_at_once(tmp_path):
    make_keys(tmp_path / "keys")
    (tmp_path / "keys" / "client.key_secret").chmod(0o644)
    recipe = prepared(tmp_path, broker={"keys": tmp_path / "keys"})
    (recipe.folder / "broker.json").write_text('{"address": "127.0.0.1:9"}')
    with pytest.raises(UserError, match="can be read by others"):
        _find_broker(None, str(recipe.folder), None)


def test_one_way_to_the_broker_is_needed():
    for join, run in ((None, None), ("a:1", "b")):
        with pytest.raises(UserError, match="either --join HOST:PORT or --run RUN"):
            _find_broker(join, run, None)
