"""The tracker of a run that goes on after an orderly stop does not take the old end for the new one."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import typer
from mlflow import MlflowClient
from typer.testing import CliRunner

from broker.run_folder import Claim, is_served
from common.recipe import load_recipe, resolved_toml
from common.run_files import RECIPE_FILE, SPOOL
from common.tracking.delivery import Delivery
from common.tracking.shipper import SpoolEnd
from common.tracking.spool import Spool
from deploy import track as tracking
from deploy import workers
from deploy.folder import prepare, read_recipe
from tests.scripted.broker import scripted_recipe

END = '{"time": 1, "kind": "end", "step": 5, "values": {}}\n'
RUN = '{"time": 2, "kind": "run", "step": 5, "values": {}}\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = prepare(load_recipe("demo", [f"run.root='{tmp_path}'"]), resume=False, fresh=False)
    (folder / SPOOL).write_text(END)
    return folder


def test_it_begins_when_the_broker_has_written_something(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Event()
    monkeypatch.setattr(tracking, "track_run", lambda folder, **_: begun.set() or 0)
    app = typer.Typer()
    app.command()(workers.track)

    def track(*options: str) -> threading.Thread:
        begun.clear()
        thread = threading.Thread(target=CliRunner().invoke, args=(app, [str(folder), *options]), daemon=True)
        thread.start()
        return thread

    waiting = track("--beyond", str(len(END)))
    assert not begun.wait(0.5)
    with (folder / SPOOL).open("a") as spool:
        spool.write(RUN)
    waiting.join(10.0)
    assert begun.is_set()
    track().join(10.0)
    assert begun.is_set(), "by hand it begins at once"


def test_the_broker_says_how_far_the_points_went(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(workers.subprocess, "Popen", lambda line, **_: started.append(line))
    workers._start_tracker(folder)
    assert started[0][-3:] == [str(folder), "--beyond", str(len(END))]


# --- a run that nobody serves and that has no end ------------------------------------------------------------


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """Its broker was ended from outside after a step."""
    recipe = scripted_recipe(
        tmp_path, tracking={"enabled": True, "uri": f"sqlite:///{tmp_path / 'mlflow.db'}"}
    )
    folder = prepare(recipe, resume=False, fresh=False)
    spool = Spool(folder / SPOOL)
    spool.append("run", 0, {"recipe": {"run": {"steps": 5}}})
    spool.append("learner", 0, {"reward": 0.5})
    return folder


@pytest.mark.parametrize("enabled", [True, False])
def test_by_hand_an_interrupted_run_is_delivered_and_not_waited_for(
    interrupted: Path, monkeypatch: pytest.MonkeyPatch, enabled: bool
) -> None:
    monkeypatch.setattr(tracking.os, "nice", lambda _: 0)
    if not enabled:
        recipe = read_recipe(interrupted)
        off = recipe.model_copy(update={"tracking": recipe.tracking.model_copy(update={"enabled": False})})
        (interrupted / RECIPE_FILE).write_text(resolved_toml(off))
    assert tracking.track_run(interrupted, by_hand=True) == 0
    assert not (interrupted / "summary.json").exists(), "that needs the broker's last words"
    if not enabled:
        return
    client, run = (
        MlflowClient(f"sqlite:///{interrupted.parent / 'mlflow.db'}"),
        Delivery.load(interrupted).mlflow_run,
    )
    assert [point.value for point in client.get_metric_history(run, "learner/reward")] == [0.5]
    assert client.get_run(run).info.status == "KILLED"


def test_the_brokers_own_tracker_and_a_served_run_wait(interrupted: Path) -> None:
    spool = SpoolEnd(interrupted / SPOOL)
    assert spool.or_interruption(lambda: False) is None
    claim = Claim(interrupted, resume=True)
    assert is_served(interrupted)
    claim.release()
    assert not is_served(interrupted)
    found = spool.or_interruption(lambda: True)
    assert found is not None
    assert (found.kind, found.step) == ("interrupted", 0)
    Spool(interrupted / SPOOL).append("end", 1, {"status": "stopped"})
    found = spool.or_interruption(lambda: True)
    assert found is not None
    assert found.kind == "end"


@pytest.mark.parametrize(("options", "by_hand"), [([], True), (["--beyond", "0"], False)])
def test_only_a_tracker_by_hand_gives_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], by_hand: bool
) -> None:
    """The broker's own starts before the broker has the folder's lock."""
    told: list[bool] = []
    monkeypatch.setattr(tracking, "track_run", lambda folder, *, by_hand: told.append(by_hand) or 0)
    app = typer.Typer()
    app.command()(workers.track)
    assert CliRunner().invoke(app, [str(folder), *options]).exit_code == 0
    assert told == [by_hand]
