"""Workers are restarted, the first error is kept, and nothing is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from common import stacks
from deploy.launch import supervisor as sv
from deploy.launch.layout import Share
from deploy.run import Silence
from tests.scripted.wait import alive, until


def worker(tmp_path: Path, name: str, code: str, *, again: str | None = None, **role: bool) -> sv.Worker:
    line = [sys.executable, "-c", code]
    return sv.Worker(
        name,
        line,
        [sys.executable, "-c", again] if again else line,
        Share(None, 1),
        tmp_path / f"{name}.log",
        **role,
    )


def watch(supervisor: sv.Supervisor) -> None:
    until(lambda: not supervisor.poll(), "the run is over")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sv, "BACKOFF_S", 0.01)


def test_essential_worker_ends_the_run_well(tmp_path: Path) -> None:
    supervisor = sv.Supervisor([worker(tmp_path, "broker", "pass", essential=True)], 3, print)
    supervisor.start()
    watch(supervisor)
    assert supervisor.failure is None


def test_crashed_worker_is_started_again_with_its_second_command(tmp_path: Path) -> None:
    events: list[str] = []
    crash = worker(tmp_path, "learner", "raise ValueError('boom')", again="import time; time.sleep(60)")
    supervisor = sv.Supervisor([crash], 3, events.append)
    supervisor.start()

    def runs_again() -> bool:
        assert supervisor.poll()
        return bool(crash.process and crash.restarts == 1 and crash.process.poll() is None)

    until(runs_again)
    assert "learner died (exit code 1: ValueError: boom); starting it again" in events[0]
    supervisor.end(term_s=1.0)
    assert crash.process.poll() is not None


def test_users_error_is_not_tried_again_and_comes_first(tmp_path: Path) -> None:
    code = (
        "import sys; print('noise'); print('error: model.path: no such folder'); print('tail'); sys.exit(2)"
    )
    supervisor = sv.Supervisor([worker(tmp_path, "actor-0", code)], 3, print)
    supervisor.start()
    watch(supervisor)
    assert supervisor.failure is not None
    assert supervisor.failure.message == "model.path: no such folder"
    assert supervisor.failure.code == 2


def test_the_run_goes_on_while_an_actor_is_left(tmp_path: Path) -> None:
    """One that a restart does not help is retired; the last of them ends the run, with the first one's error."""
    events: list[str] = []
    wait = "import pathlib, sys, time\nwhile not pathlib.Path(sys.argv[0]).exists(): time.sleep(0.02)\n"
    go = tmp_path / "go"
    last = wait.replace("sys.argv[0]", repr(str(go))) + "print('error: the second')\nsys.exit(4)\n"
    workers = [
        worker(tmp_path, "actor-0", "print('error: no memory'); raise SystemExit(4)", spare=True),
        worker(tmp_path, "actor-1", last, spare=True),
        worker(tmp_path, "learner", "import time; time.sleep(1000)"),
    ]
    supervisor = sv.Supervisor(workers, 3, events.append)
    supervisor.start()
    until(lambda: not supervisor.poll() or events)
    assert events == [
        "warning: actor-0 has failed for good (exit code 4: no memory); the run goes on with 1 left"
    ]
    go.touch()
    watch(supervisor)
    assert supervisor.failure is not None
    assert (supervisor.failure.worker, supervisor.failure.message) == ("actor-0", "no memory")
    supervisor.end(term_s=0.1)


def test_a_learner_that_left_while_the_run_goes_on_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM to it alone: it saves and leaves with exit code 0, and all GPUs would idle."""
    monkeypatch.setattr(sv, "MISSED_S", 0.05)
    events: list[str] = []
    learner = worker(tmp_path, "learner", "pass", again="import time; time.sleep(1000)", needed=True)
    broker = worker(tmp_path, "broker", "import time; time.sleep(1000)", essential=True)
    supervisor = sv.Supervisor([learner, broker], 0, events.append)
    supervisor.start()
    until(lambda: not supervisor.poll() or events)
    assert events == ["learner has left in order, but the run goes on; starting it again"]
    assert not supervisor.left("learner")
    supervisor.end(term_s=0.1)


def test_restarts_run_out(tmp_path: Path) -> None:
    supervisor = sv.Supervisor([worker(tmp_path, "actor-0", "raise SystemExit(7)")], 2, lambda text: None)
    supervisor.start()
    watch(supervisor)
    assert supervisor.workers[0].restarts == 2
    assert supervisor.failure is not None


def test_stuck_grandchildren_are_killed(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "code = 'import os, signal, time; signal.signal(15, 1); print(os.getpid(), flush=True); time.sleep(99)'\n"
        "subprocess.Popen([sys.executable, '-c', code])\n"
        "time.sleep(99)\n"
    )
    stuck = worker(tmp_path, "actor-0", code)
    supervisor = sv.Supervisor([stuck], 3, print)
    supervisor.start()
    until(lambda: stuck.log.read_text().strip(), "both ignore SIGTERM")
    grandchild = int(stuck.log.read_text().split()[0])
    supervisor.end(term_s=0.3)
    until(lambda: not alive([grandchild]))


def test_workers_die_with_a_killed_supervisor(tmp_path: Path) -> None:
    script = tmp_path / "tests_support.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from deploy.launch import supervisor as sv\n"
        "from deploy.launch.layout import Share\n"
        "line = [sys.executable, '-c', 'import time; time.sleep(99)']\n"
        "w = sv.Worker('x', line, line, Share(None, 1), Path(sys.argv[1]))\n"
        "s = sv.Supervisor([w], 0, print)\n"
        "s.start()\n"
        "print(w.process.pid, flush=True)\n"
        "time.sleep(99)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "x.log")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(sv.__file__).parents[2])},
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert alive([child])
    parent.kill()
    parent.wait()
    until(lambda: not alive([child]))


def test_a_silent_broker_has_everybodys_stacks_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the launcher does when its broker no longer answers: each worker is asked by signal."""
    monkeypatch.setattr(stacks, "of_family", partial(stacks.of_family, answer_s=60.0))
    monkeypatch.setattr(stacks, "WRITTEN_S", 1.0)
    code = (
        "import threading\nfrom common import stacks\nstacks.arm()\n"
        "def held_for_ever():\n    lock = threading.Lock(); lock.acquire(); print('held', flush=True); lock.acquire()\n"
        "held_for_ever()\n"
    )
    supervisor = sv.Supervisor([worker(tmp_path, "broker", code), worker(tmp_path, "done", "pass")], 0, print)
    supervisor.start()
    until(lambda: "held" in (tmp_path / "broker.log").read_text(), "the broker hangs")
    until(lambda: supervisor.workers[1].process.poll() is not None, "the other is done")
    prefix = supervisor.keep_stacks(tmp_path / "stacks")
    assert "held_for_ever" in Path(f"{prefix}-broker.txt").read_text()
    assert [path.name for path in prefix.parent.iterdir()] == [f"{prefix.name}-broker.txt"]
    supervisor.end(term_s=0.5)


def test_one_alarm_per_silence() -> None:
    silence = Silence(10.0)
    looks = [silence.look(seconds) for seconds in (0.0, 9.9, 10.0, 50.0, 0.2, 10.5)]
    assert looks == [False, False, True, False, False, True]
