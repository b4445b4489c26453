"""The learner process, as far as it needs no model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.messages import Heartbeat, Hello
from common.wire import Client, RefusedError
from learner.engine import Update
from learner.main import _stay_with
from learner.objective import objective_of
from learner.ranks import Ranks
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
