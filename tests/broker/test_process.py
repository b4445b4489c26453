"""The broker as a process: what it refuses before it starts, what it survives, what it hides from strangers."""

from __future__ import annotations

import json
import resource
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from broker import ending
from broker.fitness import check_bind, check_questions
from broker.main import serve
from common.errors import EXIT_RESTART, UserError
from common.keys import make_keys
from common.messages import Hello, StatusQuery, Stop
from common.wire import BrokerUnreachable, Client
from tests.scripted.actor import ScriptedActor
from tests.scripted.broker import running_broker, scripted_recipe, wait_for_broker
from tests.scripted.learner import ScriptedLearner
from tests.scripted.wait import until


def observer(address: str, keys: Path | None = None) -> Client:
    return Client(address, Hello(role="observer", peer="o", software="0.1.0", host="h", pid=1), keys=keys)


def status_of(client: Client) -> dict:
    return client.request(StatusQuery(), timeout_s=60.0).message.status


def start(worker: ScriptedActor | ScriptedLearner) -> threading.Thread:
    thread = threading.Thread(target=worker.run, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize(("interrupted", "code"), [(True, EXIT_RESTART), (False, 0)])
def test_an_interrupted_broker_does_not_say_that_the_run_is_over(
    tmp_path: Path, interrupted: bool, code: int
) -> None:
    """Launchers take exit code 0 for the end of the run, and end everybody."""
    recipe, stop, codes = scripted_recipe(tmp_path), threading.Event(), []
    thread = threading.Thread(
        target=lambda: codes.append(serve(recipe, run_folder=recipe.folder, stop_event=stop))
    )
    thread.start()
    address = wait_for_broker(recipe.folder)
    if interrupted:
        stop.set()
    else:
        observer(address).request(Stop(reason="enough"), timeout_s=10.0)
    thread.join(30.0)
    assert codes == [code]


# --- refused before anything starts ------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["10.1.2.3", "node7", "2001:db8::7"])
def test_an_open_address_needs_keys(tmp_path: Path, host: str) -> None:
    beyond, here = {"bind": host}, {"bind": "127.0.0.1"}
    for broker, weights in ((beyond, beyond), (beyond, here), (here, beyond)):
        with pytest.raises(UserError, match=r"^broker\.keys: .*needs CURVE keys"):
            check_bind(scripted_recipe(tmp_path, broker=broker, weights=weights))
    for broker in (beyond, here):
        check_bind(scripted_recipe(tmp_path, broker={**broker, "keys": tmp_path}, weights=beyond))


@pytest.mark.parametrize("host", ["0.0.0.0", "*", "::"])
@pytest.mark.parametrize("section", ["broker", "weights"])
def test_an_address_that_names_nobody_is_refused(tmp_path: Path, section: str, host: str) -> None:
    both = {"broker": {"bind": "10.1.2.3", "keys": tmp_path}, "weights": {"bind": "10.1.2.3"}}
    both[section] = {**both[section], "bind": host}
    with pytest.raises(UserError, match=rf"^{section}\.bind: name the one address"):
        check_bind(scripted_recipe(tmp_path, **both))


def test_weights_must_reach_as_far_as_the_broker(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^weights\.bind: '127\.0\.0\.1' is unreachable"):
        check_bind(scripted_recipe(tmp_path, broker={"bind": "10.1.2.3", "keys": tmp_path}))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_loopback_needs_none(tmp_path: Path, host: str) -> None:
    check_bind(scripted_recipe(tmp_path, broker={"bind": host}))


@pytest.mark.parametrize("setting", ["port", "metrics_port"])
def test_a_port_in_use_is_named(tmp_path: Path, setting: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        recipe = scripted_recipe(tmp_path, broker={setting: taken.getsockname()[1]})
        with pytest.raises(UserError, match=rf"^broker\.{setting}: port \d+ is in use"):
            serve(recipe, run_folder=recipe.folder, stop_event=threading.Event())


def test_questions_that_fill_no_step_are_refused_and_too_few_are_said_to_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = scripted_recipe(tmp_path, batch={"questions_per_step": 41})
    with pytest.raises(
        UserError, match=r"^data\.train: 40 questions x data\.max_epochs = 1 do not fill one step"
    ):
        serve(recipe, run_folder=recipe.folder, stop_event=threading.Event())
    check_questions(scripted_recipe(tmp_path, run={"steps": 11}), 40)
    assert "enough for 10 of run.steps = 11" in caplog.text


def test_one_broker_per_folder_and_one_run(tmp_path: Path) -> None:
    recipe = scripted_recipe(tmp_path, broker={"durability": "journal"})
    with running_broker(recipe), pytest.raises(UserError, match=r"^run\.name: another broker is serving"):
        serve(recipe, run_folder=recipe.folder, resume=True, stop_event=threading.Event())
    with pytest.raises(UserError, match=r"^run\.name: .*already holds a run: continue it with --resume"):
        serve(recipe, run_folder=recipe.folder, stop_event=threading.Event())
    with running_broker(recipe, resume=True) as address:
        assert status_of(observer(address))["step"] == 0


def test_a_run_in_memory_is_started_as_the_launcher_starts_it_and_never_continued(tmp_path: Path) -> None:
    recipe = scripted_recipe(tmp_path, broker={"durability": "memory"})
    with running_broker(recipe, resume=True) as address:
        assert status_of(observer(address))["step"] == 0
    with pytest.raises(UserError, match=r"^broker\.durability: 'memory' keeps nothing"):
        serve(recipe, run_folder=recipe.folder, resume=True, stop_event=threading.Event())


def test_what_may_not_change_within_a_run_is_named(tmp_path: Path) -> None:
    with running_broker(scripted_recipe(tmp_path, broker={"durability": "journal"})):
        pass
    changed = scripted_recipe(tmp_path, broker={"durability": "journal"}, data={"count": 39})
    with pytest.raises(UserError, match=r"^data\.train: it was '40 questions"):
        serve(changed, run_folder=changed.folder, resume=True, stop_event=threading.Event())
    forgetful = scripted_recipe(tmp_path, broker={"durability": "memory"})
    with pytest.raises(UserError, match=r"^broker\.durability: 'memory' keeps nothing"):
        serve(forgetful, run_folder=forgetful.folder, resume=True, stop_event=threading.Event())


# --- survived ----------------------------------------------------------------------------------------------


def test_without_a_learner_actors_idle_and_memory_stays(tmp_path: Path) -> None:
    recipe = scripted_recipe(tmp_path, batch={"max_staleness": 1})
    with running_broker(recipe) as address:
        actors = [ScriptedActor(address, f"actor-{i}", group_s=0.0) for i in range(2)]
        threads = [start(actor) for actor in actors]
        client = observer(address)
        until(lambda: status_of(client)["ledger"]["buffered"] == 8)
        size = status_of(client)["queue"]["store_bytes"]
        time.sleep(0.5)
        after = status_of(client)
        assert after["ledger"]["leased"] == 8, "two steps of four groups and not one more"
        assert after["queue"]["store_bytes"] == size
        client.request(Stop(reason="test over"))
        for thread in threads:
            thread.join(60.0)
            assert not thread.is_alive()


def test_stop_ends_actors_then_learner_then_broker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "STOP_S", 1000.0)  # nobody is given up: all leave by themselves
    recipe = scripted_recipe(tmp_path, run={"steps": 1000}, data={"max_epochs": 100})
    with running_broker(recipe) as address:
        actor, learner = ScriptedActor(address, "actor"), ScriptedLearner(address, tmp_path / "c.json")
        threads = [start(actor), start(learner)]
        until(lambda: len(learner.history) > 2)
        observer(address).request(Stop(reason="Ctrl-C"))
        for thread in threads:
            thread.join(60.0)
            assert not thread.is_alive()
    assert json.loads((tmp_path / "c.json").read_text()) == learner.history, (
        "the learner wrote its last checkpoint"
    )
    end = json.loads((recipe.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert end["values"]["status"] == "stopped"
    peers = end["values"]["final"]["peers"]
    assert not peers["actor"]["alive"]
    assert not peers["learner"]["alive"]


def test_a_full_disk_stops_the_intake_and_it_resumes(tmp_path: Path) -> None:
    """The limit is the kernel's own (RLIMIT_FSIZE of the broker's process): every file beyond it cannot grow."""
    recipe = scripted_recipe(
        tmp_path, run={"steps": 10}, broker={"durability": "journal"}, data={"count": 40}
    )
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    process = subprocess.Popen([sys.executable, "-m", "tests.scripted.broker", str(tmp_path / "recipe.json")])
    try:
        address = wait_for_broker(recipe.folder)
        client = observer(address)
        assert status_of(client)["disk_full"] is None
        largest = max(path.stat().st_size for path in recipe.folder.rglob("*") if path.is_file())
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (largest + 3000, resource.RLIM_INFINITY))
        actor, learner = ScriptedActor(address, "actor"), ScriptedLearner(address, tmp_path / "c.json")
        threads = [start(actor), start(learner)]
        until(lambda: status_of(client)["disk_full"] is not None)
        assert "disk is full" in status_of(client)["disk_full"]
        until(lambda: "full" in actor.refused)
        assert len(learner.history) < 10
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, unlimited)
        for thread in threads:
            thread.join(60.0)
        assert process.wait(60.0) == 0
    finally:
        process.kill()
        process.wait()
    assert sorted(key for step in learner.history for key in step) == sorted(f"0:{i}" for i in range(40))


# --- hidden from strangers ---------------------------------------------------------------------------------


def test_with_keys_only_their_holders_join(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys")
    recipe = scripted_recipe(tmp_path, broker={"keys": tmp_path / "keys"}, run={"steps": 2})
    with running_broker(recipe) as address:
        stranger = observer(address)
        with pytest.raises(BrokerUnreachable):
            stranger.connect(timeout_s=0.5)
        actor = ScriptedActor(address, "actor", keys=tmp_path / "keys")
        learner = ScriptedLearner(address, tmp_path / "c.json", keys=tmp_path / "keys")
        threads = [start(actor), start(learner)]
        for thread in threads:
            thread.join(60.0)
            assert not thread.is_alive()
        stranger.close()
    assert len(learner.history) == 2


def test_the_metrics_page_shows_the_ledger(tmp_path: Path) -> None:
    recipe = scripted_recipe(tmp_path)
    with running_broker(recipe) as address:
        actor = ScriptedActor(address, "actor", group_s=0.0)
        thread = start(actor)
        port = json.loads((recipe.folder / "broker.json").read_text())["metrics_port"]

        def page() -> str:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()

        until(lambda: 'slipstream_groups{state="buffered"} 8.0' in page())
        text = page()
        assert 'slipstream_run{what="ledger_sum_ok"} 1.0' in text
        assert "slipstream_leases_total 8.0" in text
        assert 'slipstream_peers{role="actor"} 1.0' in text
        assert "slipstream_ack_seconds_bucket" in text
        assert "slipstream_lease_age_seconds_bucket" in text
        observer(address).request(Stop(reason="test over"))
        thread.join(60.0)
