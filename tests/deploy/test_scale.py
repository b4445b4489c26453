"""`slipstream scale` without Slurm: fewer actors while a real broker's run goes on; more are somebody else's to start."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from common.errors import UserError
from common.recipe import resolved_toml
from deploy import cli
from deploy.scale import surplus
from deploy.watch import ask_status
from tests.scripted.actor import ScriptedActor
from tests.scripted.broker import running_broker, scripted_recipe
from tests.scripted.learner import ScriptedLearner
from tests.scripted.wait import until


def test_a_run_goes_on_with_fewer_actors(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe = scripted_recipe(tmp_path, run={"steps": 400}, data={"count": 2000}, broker={"heartbeat_s": 0.05})
    recipe.folder.mkdir()
    (recipe.folder / "recipe.toml").write_text(resolved_toml(recipe))

    def scale(wanted: int) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["scale", str(recipe.folder), "--actors", str(wanted)])
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    with running_broker(recipe) as address:
        actors = [ScriptedActor(address, f"actor-{number}") for number in range(3)]
        learner = ScriptedLearner(address, tmp_path / "checkpoint.json")
        threads = [threading.Thread(target=worker.run, daemon=True) for worker in [*actors, learner]]
        for thread in threads:
            thread.start()
        until(lambda: ask_status(address, None)["step"] >= 2)

        code, said = scale(1)
        assert (code, "asked to leave after the work in hand" in said) == (0, True)
        until(lambda: sum(thread.is_alive() for thread in threads[:3]) == 1)
        step = ask_status(address, None)["step"]
        until(lambda: ask_status(address, None)["step"] > step + 2)
        assert ask_status(address, None)["ledger"]["sum_ok"]
        assert scale(1) == (0, "actors: 1 wanted, 1 there: nothing to do\n")
        code, said = scale(4)
        assert (code, said.count("\n")) == (2, 1)
        assert said.startswith(
            "error: --actors: the run has 1 actors; without Slurm, start more on the host where they should run"
        )
        for worker in [*actors, learner]:
            worker.stop()
        for thread in threads:
            thread.join(10.0)


def test_a_run_without_a_broker(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("")
    with pytest.raises(SystemExit) as ended:
        cli.main(["scale", str(tmp_path), "--actors", "1"])
    assert ended.value.code == 2


def actor(joined: float, **more: object) -> dict:
    return {"role": "actor", "alive": True, "state": "generating", "joined": joined} | more


def test_those_that_joined_last_go_first() -> None:
    peers = {"a": actor(3.0), "b": actor(1.0), "c": actor(2.0), "learner": {"role": "learner"}}
    assert surplus(peers, 1) == ["c", "a"]
    assert surplus(peers, 3) == []


def test_who_leaves_or_is_gone_counts_no_more() -> None:
    peers = {"a": actor(1.0), "b": actor(2.0, state="draining"), "c": actor(3.0, alive=False)}
    assert surplus(peers, 0) == ["a"]
    assert surplus(peers, 1) == []
    with pytest.raises(UserError, match="--actors: the run has 1 actors"):
        surplus(peers, 2)
