"""Outages of a real MLflow server: the run never stops, no point is lost or doubled, and the display says so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from common.recipe import Recipe, resolved_toml
from common.tracking.catalogue import entry_of, full_name
from common.tracking.delivery import Delivery
from common.tracking.shipper import NOT_METRICS
from common.tracking.spool import Record, read_spool
from deploy import screen as screens
from deploy.watch import ask_status
from tests.common.mlflow_server import MlflowServer
from tests.scripted.actor import ScriptedActor
from tests.scripted.broker import running_broker, scripted_recipe
from tests.scripted.learner import ScriptedLearner
from tests.scripted.wait import until

pytestmark = pytest.mark.e2e
REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE_S = 180.0
BEHIND_S = 10.0  # what is delivered within it counts as caught up; the end of a test compares every point


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    (tmp_path / "mlflow").mkdir()
    server = MlflowServer(tmp_path / "mlflow")
    try:
        yield server
    finally:
        server.close()


def a_recipe(folder: Path, uri: str, steps: int) -> Recipe:
    recipe = scripted_recipe(
        folder, run={"steps": steps}, data={"count": 4000}, tracking={"uri": uri}, eval={"every": 1000}
    )
    recipe.folder.mkdir(parents=True, exist_ok=True)
    (recipe.folder / "recipe.toml").write_text(resolved_toml(recipe))
    return recipe


class ScriptedRun:
    """A run with scripted peers, and the real tracker process."""

    def __init__(self, recipe: Recipe, address: str, tracker: subprocess.Popen) -> None:
        self.folder, self.address, self.tracker = recipe.folder, address, tracker

    def records(self) -> list[Record]:
        return list(read_spool(self.folder / "metrics.jsonl"))

    def steps(self) -> int:
        return sum(record.kind == "learner" for record in self.records())

    def goes_on(self, steps: int) -> None:
        goal = self.steps() + steps
        until(lambda: self.steps() >= goal, "the run goes on")

    def caught_up(self) -> bool:
        tracking = ask_status(self.address, None, timeout_s=60.0)["tracking"]
        return tracking["error"] is None and tracking["seconds_behind"] < BEHIND_S

    def says_behind(self, monkeypatch: pytest.MonkeyPatch) -> bool:
        """What a person sees, on the screen and in line mode."""
        monkeypatch.setattr(screens, "BEHIND_SHOWN_S", 1.0)
        status = ask_status(self.address, None, timeout_s=60.0)
        console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        console.print(screens.screen(status, title="t"))
        if "MLflow is" not in console.export_text():
            return False
        assert "points behind" in screens.line(status)
        return status["tracking"]["error"] is not None


@contextmanager
def running(recipe: Recipe, tracker: list[str], step_s: float) -> Iterator[ScriptedRun]:
    environment = {**os.environ, "MLFLOW_HTTP_REQUEST_TIMEOUT": "8"}
    with running_broker(recipe) as address:
        peers = [
            ScriptedActor(address, "actor-0", group_s=0.001),
            ScriptedLearner(address, recipe.folder / "checkpoint.json", step_s=step_s),
        ]
        threads = [threading.Thread(target=peer.run, daemon=True) for peer in peers]
        process = subprocess.Popen([sys.executable, *tracker], cwd=REPOSITORY, env=environment)
        for thread in threads:
            thread.start()
        try:
            yield ScriptedRun(recipe, address, process)
            process.wait(PATIENCE_S)
        finally:
            for peer, thread in zip(peers, threads, strict=True):
                peer.stop()
                thread.join(60.0)
            if process.poll() is None:
                process.kill()


def expected(records: list[Record]) -> Counter[tuple[str, int, float]]:
    """What MLflow must hold: every number of every point, once."""
    return Counter(
        (full_name(record.kind, name), record.step, float(value))
        for record in records
        if record.kind not in NOT_METRICS
        for name, value in record.values.items()
        if isinstance(value, int | float)
    )


def assert_same(found: Counter, wanted: Counter) -> None:
    assert found - wanted == Counter(), "doubled, or not of this run"
    assert wanted - found == Counter(), "lost"


def test_a_server_that_is_killed_hangs_and_refuses(
    tmp_path: Path, server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.start()
    recipe = a_recipe(tmp_path / "run", server.url, steps=1000)
    with running(recipe, ["-m", "deploy", "track", str(recipe.folder)], step_s=0.1) as run:
        until(lambda: (recipe.folder / "tracking.json").exists(), "the tracker starts")
        until(lambda: Delivery.load(run.folder).offset > 0, "first points are delivered")

        server.kill()
        run.goes_on(5)
        until(lambda: run.says_behind(monkeypatch), "the display says that MLflow is behind (killed)")
        run.goes_on(5)
        server.start()
        until(run.caught_up, "everything is delivered after the restart")

        server.signal(signal.SIGSTOP)
        run.goes_on(5)
        until(lambda: run.says_behind(monkeypatch), "the display says that MLflow is behind (hung)")
        server.signal(signal.SIGCONT)
        until(run.caught_up, "everything is delivered after the hang")

        server.sql("ALTER TABLE metrics RENAME TO away")
        run.goes_on(5)
        until(lambda: run.says_behind(monkeypatch), "the display says that MLflow is behind (500)")
        assert "50" in Delivery.load(run.folder).error
        server.sql("ALTER TABLE away RENAME TO metrics")
        until(run.caught_up, "everything is delivered after the refusals")
        stop_run(run)
    assert run.tracker.returncode == 0
    records = run.records()
    assert records[-1].kind == "end"
    (run_id,) = [row[0] for row in server.sql("SELECT run_uuid FROM runs")]
    assert_same(server.metrics(run_id), expected(records))
    assert server.sql("SELECT status FROM runs") == [("KILLED",)]
    assert not {name for name, _, _ in expected(records) if entry_of(name) is None}


def stop_run(run: ScriptedRun) -> None:
    from deploy.watch import ask_to_stop

    assert ask_to_stop(run.folder, None, "enough")
    until(lambda: run.records()[-1].kind == "end", "the run ends")


def test_an_address_that_is_wrong_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = a_recipe(tmp_path / "run", "http://127.0.0.1:9", steps=1000)
    track = f"from pathlib import Path; from deploy.track import track_run; exit(track_run(Path({str(recipe.folder)!r}), 1.0))"
    with running(recipe, ["-c", track], step_s=0.1) as run:
        until(lambda: run.says_behind(monkeypatch), "the display says that MLflow is behind (wrong address)")
        stop_run(run)
    assert run.tracker.returncode == 1
    assert run.steps() > 5
    assert json.loads((recipe.folder / "summary.json").read_text())["status"] == "stopped"
    assert (recipe.folder / "progress.png").exists()

    # The address is corrected afterwards: `slipstream track RUN` delivers everything.
    right = a_recipe(tmp_path / "run", f"sqlite:///{tmp_path / 'mlflow.db'}", steps=1000)
    command = [sys.executable, "-m", "deploy", "track", str(right.folder)]
    assert subprocess.run(command, cwd=REPOSITORY, check=False).returncode == 0
    store = MlflowServer(tmp_path)
    (run_id,) = [row[0] for row in store.sql("SELECT run_uuid FROM runs")]
    assert_same(store.metrics(run_id), expected(run.records()))
