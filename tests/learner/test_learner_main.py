"""The learner process, as far as it needs no model."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.errors import RunFailedError
from common.messages import Ack, Heartbeat, Hello, Refused
from common.wire import Client, RefusedError, Reply
from learner import main as learner_main
from learner.engine import Update
from learner.main import _patiently, _stay_with
from learner.objective import objective_of
from learner.outcome import count_start, forget_starts
from learner.ranks import Ranks, launch_token
from learner.step import PolicyStep
from tests.learner.tiny import tiny_recipe
from tests.scripted.broker import running_broker, scripted_recipe


def test_a_learner_does_not_go_on_in_another_run(tmp_path: Path) -> None:
    """Another run may be served later at the same address; its weights would be trained on foreign groups."""
    with running_broker(scripted_recipe(tmp_path / "one", run={"name": "one"})) as address:
        client = Client(address, Hello(role="learner", peer="learner", software="0.1.0", host="h", pid=1))
        _stay_with(client.connect(10.0).run, client)
    port = int(address.partition(":")[2])
    other = scripted_recipe(tmp_path / "two", run={"name": "two"}, broker={"port": port})
    with running_broker(other), pytest.raises(RefusedError, match="serves the run 'two', not 'one'"):
        client.request(Heartbeat(state="training"), timeout_s=20.0)
    client.close()


def test_every_update_of_a_step_is_progress() -> None:
    """A step of many updates may take longer than the watchdog waits."""
    signs: list[str] = []
    engine = SimpleNamespace(
        ranks=Ranks(0, 1, torch.device("cpu")), update=lambda rows, loss: Update(1.0, True, 0.1)
    )
    step = PolicyStep(engine, objective_of(tiny_recipe()), None, lambda: signs.append("update"))
    step.run([[], [], []], torch.zeros(1, 4), 3)
    assert len(signs) == 3


@pytest.mark.parametrize(("silent_after_s", "welcome"), [(205.0, True), (1e9, False)])
def test_a_predecessor_is_waited_for_until_the_broker_takes_it_for_dead(
    monkeypatch: pytest.MonkeyPatch, silent_after_s: float, welcome: bool
) -> None:
    clock = [0.0]
    time = SimpleNamespace(monotonic=lambda: clock[0], sleep=lambda seconds: None)
    monkeypatch.setattr(learner_main, "time", time)

    def request(message: object, timeout_s: float) -> Reply:
        clock[0] += timeout_s
        if clock[0] < silent_after_s:
            raise RefusedError(Refused(code="not_now", reason="a learner is in the run", passes_s=200.0))
        return Reply(Ack(), [])

    client, stop = SimpleNamespace(request=request), threading.Event()
    if welcome:
        assert _patiently(client, Heartbeat(state="joining"), stop) == Ack()
    else:
        with pytest.raises(RunFailedError, match="a learner is in the run"):
            _patiently(client, Heartbeat(state="joining"), stop)
        assert 200.0 < clock[0] < 300.0


def test_the_ranks_of_one_start_have_a_name_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    def token(rank: int, **changes: str) -> str:
        start = {"RANK": str(rank), "WORLD_SIZE": "2", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1"} | changes
        for name, value in start.items():
            monkeypatch.setenv(name, value)
        return launch_token()

    assert token(0) == token(1) != ""
    assert token(0) != token(0, SLURM_STEP_ID="2"), "started again in the same job"
    assert token(0, WORLD_SIZE="1") == "", "one rank: the process itself"


def test_a_learner_that_never_gets_past_a_step_is_not_started_for_ever(tmp_path: Path) -> None:
    """However long each attempt takes, and whoever starts it again."""
    for step in (0, 7, 3, 7):  # at 3 it was killed soon after it had gone back to its checkpoint
        count_start(tmp_path, step, 2)
    with pytest.raises(
        RunFailedError, match=r"has crashed 3 times at step 7, more often than launch.restarts = 2"
    ):
        count_start(tmp_path, 7, 2)
    count_start(tmp_path, 7, 2)  # somebody has seen to it


def test_progress_and_an_orderly_end_forgive_earlier_crashes(tmp_path: Path) -> None:
    for step in range(10):
        count_start(tmp_path, step, 1)
        count_start(tmp_path, step, 1)
    forget_starts(tmp_path)
    count_start(tmp_path, 9, 0)
