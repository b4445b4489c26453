"""What a replay's learner may use: as much as the recorded one, or what there is; and what is said of a replay."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from common.errors import UserError
from common.recipe import Recipe
from deploy.folder import prepare
from deploy.launch.layout import share_out
from deploy.launch.machine import this_machine
from deploy.replay import _take_learners_share, _wait, replay_recipe, say_trained, start_replay
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


def test_what_kept_no_record_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    recipe = scripted_recipe(tmp_path)
    prepare(recipe, resume=False, fresh=False)
    with pytest.raises(UserError, match=r"^--replay: '.*' holds no journal to replay"):
        start_replay(str(recipe.folder))
    assert not list(tmp_path.glob("*-replay-*"))


def test_a_broker_that_refuses_is_quoted_without_a_second_prefix(tmp_path: Path) -> None:
    (tmp_path / "broker.log").write_text("error: --replay: the journal cannot be read.\n")
    with pytest.raises(UserError) as seen:
        _wait(SimpleNamespace(poll=lambda: 2), tmp_path)
    assert str(seen.value) == "--replay: the journal cannot be read"


def test_what_is_replayed_and_where_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = prepare(scripted_recipe(tmp_path), resume=False, fresh=False)
    monkeypatch.setattr(
        "deploy.replay.open_recording",
        lambda *_: (SimpleNamespace(last_step=5), SimpleNamespace(close=lambda: None)),
    )
    monkeypatch.setattr("deploy.replay.subprocess.Popen", lambda *_, **__: None)
    monkeypatch.setattr("deploy.replay._take_learners_share", lambda _: None)
    monkeypatch.setattr("deploy.replay._wait", lambda *_: None)
    folder = start_replay(str(recorded))
    for step in (2, 6):
        model = folder / "checkpoints" / f"step-{step:06d}" / "hf"
        model.mkdir(parents=True)
        (model / "config.json").touch()
    say_trained(folder)
    said = capsys.readouterr().out
    assert f"the 6 recorded steps of '{recorded}', in '{folder}'" in said
    assert f"'{folder}/checkpoints/step-000006/hf'" in said


def test_a_replay_binds_this_machine_whatever_host_the_record_names(tmp_path: Path) -> None:
    recipe = scripted_recipe(
        tmp_path, broker={"bind": "10.9.8.7"}, weights={"bind": "10.9.8.7", "port": 25001}
    )
    replayed = replay_recipe(recipe, tmp_path / "run")
    assert (replayed.broker.bind, replayed.weights.bind, replayed.weights.port) == (
        "127.0.0.1",
        "127.0.0.1",
        0,
    )
