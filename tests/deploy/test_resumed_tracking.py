"""The tracker of a run that goes on after an orderly stop does not take the old end for the new one."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from common.recipe import load_recipe
from common.tracking.spool import SPOOL
from deploy import track as tracking
from deploy import workers
from deploy.folder import prepare

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
    monkeypatch.setattr(tracking, "track_run", lambda folder: begun.set() or 0)
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
