"""A run is stopped in order: by `slipstream stop`, and by Ctrl-C of `slipstream run`."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from broker import ending
from common.errors import UserError
from deploy import run
from deploy.launch.layout import Share
from deploy.launch.supervisor import Failure, Supervisor, Worker
from deploy.stop import stop
from tests.scripted.actor import ScriptedActor
from tests.scripted.broker import running_broker, scripted_recipe
from tests.scripted.learner import ScriptedLearner
from tests.scripted.wait import until

app = typer.Typer()
app.command()(stop)


class SlowSaver(ScriptedLearner):
    """A learner whose last checkpoint takes longer than all others get to leave."""

    def _save(self) -> None:
        if self._stopping.is_set():
            time.sleep(4 * ending.STOP_S)
        super()._save()


def test_the_verb_stops_a_run_and_its_last_checkpoint_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "STOP_S", 0.3)
    recipe = scripted_recipe(tmp_path, run={"steps": 1000}, data={"max_epochs": 100})
    with running_broker(recipe) as address:
        workers = [ScriptedActor(address, "actor"), SlowSaver(address, tmp_path / "c.json", every=10_000)]
        threads = [threading.Thread(target=worker.run, daemon=True) for worker in workers]
        for thread in threads:
            thread.start()
        until(lambda: len(workers[1].history) > 2)
        done = CliRunner().invoke(app, ["--join", address])
        assert (done.exit_code, "writes a checkpoint" in done.output) == (0, True)
        for thread in threads:
            thread.join(60.0)
            assert not thread.is_alive()
    assert json.loads((tmp_path / "c.json").read_text()) == workers[1].history
    end = json.loads((recipe.folder / "metrics.jsonl").read_text().splitlines()[-1])["values"]
    assert (end["status"], end["reason"]) == ("stopped", "slipstream stop")
    assert end["final"]["peers"]["learner"]["farewell"] == "left: told to stop", "the broker was still there"


@pytest.mark.parametrize("arguments", [[], ["demo", "--join", "127.0.0.1:9"]])
def test_the_verb_wants_one_run(arguments: list[str]) -> None:
    with pytest.raises(UserError, match="either RUN or --join"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


# --- Ctrl-C ------------------------------------------------------------------------------------------------

LEARNER = (
    "import pathlib, time\n"
    "while not pathlib.Path('asked').exists(): time.sleep(0.02)\n"
    "time.sleep(2)\n"
    "pathlib.Path('checkpoint').touch()\n"
)
BROKER = "import pathlib, time\nwhile not pathlib.Path('checkpoint').exists(): time.sleep(0.02)\n"
STUCK = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(1000)\n"


class FakeDisplay:
    """What `_stop` asks of the display; `answers` is how the broker answers each attempt to reach it."""

    def __init__(self, folder: Path, answers: list[bool]) -> None:
        self.folder, self.answers, self.said, self.step = folder, answers, [], 7

    def ask_to_stop(self, reason: str) -> bool:
        self.reason = reason
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer:
            (self.folder / "asked").touch()
        return answer

    def say(self, text: str) -> None:
        self.said.append(text)

    def refresh(self) -> None: ...

    def say_where(self) -> None: ...

    def broker_silent_s(self) -> float:
        return 0.0


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], Supervisor]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "ORDERLY_S", 0.5)
    monkeypatch.setattr(run, "TERM_S", 0.1)

    def start(programs: dict[str, str]) -> Supervisor:
        lines = {name: [sys.executable, "-c", code] for name, code in programs.items()}
        workers = [
            Worker(name, line, line, Share(None, 1), tmp_path / f"{name}.log") for name, line in lines.items()
        ]
        supervisor = Supervisor(workers, 0, print)
        supervisor.start()
        return supervisor

    return start


def gone(supervisor: Supervisor) -> bool:
    return all(supervisor.left(worker.name) for worker in supervisor.workers)


@pytest.mark.parametrize("answers", [[True], [False, True]])
def test_ctrl_c_waits_for_the_checkpoint_and_for_no_stuck_actor(
    tmp_path: Path, started: Callable, answers: list[bool]
) -> None:
    """The learner takes several times ORDERLY_S; the broker may hear the request at the second attempt only."""
    supervisor = started({"learner": LEARNER, "broker": BROKER, "actor-0": STUCK})
    display = FakeDisplay(tmp_path, answers)
    assert run._stop(supervisor, display, SimpleNamespace(count=1), 30.0) == 130
    assert (tmp_path / "checkpoint").exists()
    assert gone(supervisor)
    assert "Ctrl-C again ends everything at once" in display.said[0]
    assert display.said[-1].startswith("stopped at step 7; continue with: slipstream run ")
    assert display.said[-1].endswith("--resume")


@pytest.mark.parametrize("broker_there", [True, False])
def test_the_learner_saves_when_another_worker_has_failed_for_good(
    tmp_path: Path, started: Callable, broker_there: bool
) -> None:
    """Asked by the broker or, where that is what has failed, by a signal; it takes longer than TERM_S."""
    by_signal = (
        "import pathlib, signal, sys, time\n"
        "def save(*_): time.sleep(1); pathlib.Path('checkpoint').touch(); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\npathlib.Path('ready').touch()\ntime.sleep(1000)\n"
    )
    if broker_there:
        supervisor = started({"learner": LEARNER, "broker": BROKER, "actor-0": STUCK})
    else:
        supervisor = started({"learner": by_signal, "broker": "raise SystemExit(4)"})
        until(lambda: supervisor.left("broker") and (tmp_path / "ready").exists())
    supervisor.failure = Failure("actor-0" if broker_there else "broker", 4, "no memory", tmp_path / "log")
    display = FakeDisplay(tmp_path, [True])
    run._save_work(supervisor, display, SimpleNamespace(count=0), 30.0)
    supervisor.end(term_s=0.1)
    assert (tmp_path / "checkpoint").exists()
    assert "failed for good: no memory" in display.said[0]


@pytest.mark.parametrize(("presses", "answer"), [(2, True), (1, False)])
def test_a_second_ctrl_c_or_a_broker_that_is_gone_ends_it_without(
    tmp_path: Path, started: Callable, presses: int, answer: bool
) -> None:
    supervisor = started({"learner": STUCK, "broker": STUCK})
    display = FakeDisplay(tmp_path, [answer])
    assert run._stop(supervisor, display, SimpleNamespace(count=presses), 30.0) == 130
    assert gone(supervisor)


@pytest.mark.parametrize("presses", [0, 1])
def test_after_the_end_of_a_run_nobody_is_waited_for_without_end(
    started: Callable, monkeypatch: pytest.MonkeyPatch, presses: int
) -> None:
    """A worker that never joined does not know that the run is over; Ctrl-C need not wait for END_S."""
    monkeypatch.setattr(run, "END_S", 0.3 if presses == 0 else 1000.0)
    supervisor = started({"actor-0": STUCK, "learner": "pass"})
    run._let_leave(supervisor, SimpleNamespace(count=presses))
    supervisor.end(term_s=0.1)
    assert gone(supervisor)
