"""Who may join, who is told why not, and who is sent away."""

from __future__ import annotations

import re
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from broker.main import serve
from common import wire
from common.errors import UserError
from common.messages import Drain, Goodbye, Heartbeat, Hello, Lease, Pulse, StatusQuery
from common.recipe import Recipe
from common.recipe.digest import sampling_digest
from common.software import compatible
from common.wire import Client, RefusedError
from tests.scripted.broker import running_broker, scripted_recipe

OURS = "0.1.0"


def hello(name: str, role: str = "actor", **more: object) -> Hello:
    facts = {"software": OURS, "host": socket.gethostname(), "pid": 4711} | more
    return Hello(role=role, peer=name, **facts)


def refusal(address: str, who: Hello) -> RefusedError:
    client = Client(address, who)
    try:
        with pytest.raises(RefusedError) as caught:
            client.connect(60.0)
        return caught.value
    finally:
        client.close()


def status(address: str) -> dict:
    client = Client(address, hello("eye", "observer"))
    try:
        return client.request(StatusQuery(), timeout_s=60.0).message.status
    finally:
        client.close()


def warnings(address: str) -> list[str]:
    return [event["text"] for event in status(address)["warnings"]]


def test_an_actor_of_another_version_is_refused(tmp_path: Path) -> None:
    with running_broker(scripted_recipe(tmp_path)) as address:
        refused = refusal(address, hello("actor-0", software="0.2.0", host="node7"))
        assert refused.code == "incompatible"
        assert str(refused) == (
            "this broker is Slipstream 0.1.0 and actor-0 on node7 is 0.2.0: install the same version there"
        )
        assert "actor-0" not in status(address)["peers"]


@pytest.mark.parametrize(
    ("now", "code"),
    [
        ({"rollout": {"temperature": 0.3}}, "changed"),
        ({"data": {"template": "Q: {question} A:"}}, "changed"),
        ({"verifier": {"level": "full"}}, "changed"),
        ({"run": {"steps": 9}, "data": {"max_epochs": 3}, "learner": {"lr": 1.0}}, None),
    ],
)
def test_an_actor_that_samples_by_the_recipe_of_before_is_sent_for_a_fresh_one(
    tmp_path: Path, now: dict, code: str | None
) -> None:
    """It outlived a stop; the run was resumed with another recipe, and its groups would be another policy's (I6)."""
    with running_broker(scripted_recipe(tmp_path, broker={"durability": "journal"})) as address:
        client = Client(address, hello("actor-0"))
        before = Recipe.model_validate(client.connect(10.0).recipe)
        client.close()
    resumed = scripted_recipe(tmp_path, **{"broker": {"durability": "journal"}, **now})
    with running_broker(resumed, resume=True) as address:
        old = hello("actor-0", sampling=sampling_digest(before))
        if code is None:
            client = Client(address, old)
            assert client.connect(10.0).resumed
            client.close()
        else:
            assert refusal(address, old).code == code


@pytest.mark.parametrize(
    ("one", "other", "meet"),
    [
        ("0.1.0", "0.1.7", True),
        ("0.1.0", "0.2.0", False),
        ("0", "0.1.0", True),
        ("1.2.0", "1.9.3", True),
        ("1.0.0", "2.0.0", False),
        ("0.1.0", "1.0.0", False),
    ],
)
def test_which_versions_may_meet(one: str, other: str, meet: bool) -> None:
    assert compatible(one, other) is compatible(other, one) is meet


@pytest.mark.parametrize(("first", "second"), [("learner", "actor"), ("actor", "learner")])
def test_another_tokenizer_is_refused_whoever_comes_first(tmp_path: Path, first: str, second: str) -> None:
    with running_broker(scripted_recipe(tmp_path)) as address:
        client = Client(address, hello("one", first, tokenizer="a" * 64))
        client.connect(60.0)
        refused = refusal(address, hello("two", second, tokenizer="b" * 64, host="node7"))
        assert refused.code == "incompatible"
        assert str(refused) == (
            "the tokenizer of two on node7 differs from that of the others in this run: model.path must hold the "
            "same model on every host"
        )
        client.close()


def test_two_actors_of_one_name_do_not_throw_each_other_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In containers both may be process 1. The second is told, and the first keeps its leases."""
    monkeypatch.setattr(wire, "PREDECESSOR_S", 1.0)
    with running_broker(
        scripted_recipe(tmp_path, broker={"heartbeat_s": 60.0, "dead_after_s": 200.0})
    ) as address:
        first = Client(address, hello("actor-0", host="node7", pid=1, process="a"))
        first.connect(60.0)
        granted = first.request(Lease(capacity=2, version=0, era=0, wait_s=0.0), timeout_s=60.0).message
        second = Client(address, hello("actor-0", host="node8", pid=1, process="b"))
        with pytest.raises(
            RefusedError, match=r"'actor-0' is in the run \(process 1 on node7.*another --name"
        ):
            second.connect(60.0)
        assert beat(first).command == "run"
        assert status(address)["leases"]["count"] == len(granted.groups) == 2
        first.close()
        second.close()


def test_an_actor_that_was_restarted_is_let_in_once_its_predecessor_is_silent(tmp_path: Path) -> None:
    recipe = scripted_recipe(tmp_path, broker={"heartbeat_s": 0.3, "dead_after_s": 200.0, "max_attempts": 2})
    with running_broker(recipe) as address:
        first = Client(address, hello("actor-0", pid=1, process="a"))
        first.connect(60.0)
        first.request(Lease(capacity=2, version=0, era=0, wait_s=0.0), timeout_s=60.0)
        first.close()
        second = Client(address, hello("actor-0", pid=1, process="b"))
        second.connect(60.0)
        second.close()
        questions = status(address)["ledger"]["questions"]
        assert (questions["pending_again"], questions["given_up"]) == (2, 0)


def test_a_second_learner_does_not_rewind_the_run_of_the_first(tmp_path: Path) -> None:
    """It has no checkpoint of its own perhaps: welcomed, it would begin again at step 0."""
    with running_broker(scripted_recipe(tmp_path, broker={"dead_after_s": 200.0})) as address:
        first = Client(address, hello("learner", "learner", host="node7", pid=1, process="a"))
        rank = Client(address, hello("learner", "learner", host="node8", pid=2, process="a"))
        second = Client(address, hello("learner", "learner", host="node7", pid=1, process="b"))
        first.connect(10.0)
        rank.connect(10.0)
        with pytest.raises(
            RefusedError, match=r"a learner is in the run already \(process 1 on node7"
        ) as caught:
            second.connect(1.5)
        assert (caught.value.code, caught.value.passes_s) == ("not_now", 200.0)
        assert beat(first).command == "run"
        first.request(Goodbye(reason="leaving"), timeout_s=10.0)
        second.connect(10.0)
        with pytest.raises(RefusedError, match="a learner is in the run already"):
            first.request(Heartbeat(state="training"), timeout_s=1.5)
        for client in (first, rank, second):
            client.close()


def test_a_learner_whose_process_is_gone_is_followed_at_once(tmp_path: Path) -> None:
    killed = subprocess.Popen(["sleep", "1000"])
    with running_broker(scripted_recipe(tmp_path, broker={"dead_after_s": 200.0})) as address:
        first = Client(address, hello("learner", "learner", pid=killed.pid, process="a"))
        first.connect(10.0)
        killed.kill()
        killed.wait()
        second = Client(address, hello("learner", "learner", pid=killed.pid + 1, process="b"))
        second.connect(20.0)
        first.close()
        second.close()


def test_a_question_that_kills_every_actor_is_given_up_however_fast_they_come_back(tmp_path: Path) -> None:
    recipe = scripted_recipe(tmp_path, broker={"heartbeat_s": 0.1, "dead_after_s": 200.0, "max_attempts": 2})
    with running_broker(recipe) as address:
        for process in ("a", "b", "c"):
            client = Client(address, hello("actor-0", pid=1, process=process))
            client.connect(60.0)
            client.request(Lease(capacity=1, version=0, era=0, wait_s=0.0), timeout_s=60.0)
            client.close()
        assert status(address)["ledger"]["questions"]["given_up"] == 1


def test_a_clock_that_is_off_is_said_once_and_costs_no_lease(tmp_path: Path) -> None:
    recipe = scripted_recipe(tmp_path, broker={"lease_s": 30.0})
    with running_broker(recipe) as address:
        client = Client(address, hello("actor-0", host="node7"))
        client.connect(60.0)
        granted = client.request(Lease(capacity=2, version=0, era=0, wait_s=0.0), timeout_s=60.0).message
        held = [assignment.group for assignment in granted.groups]
        for _ in range(3):
            beat = Heartbeat(state="generating", leases=held, time=time.time() - 312.0)
            client.request(beat, timeout_s=60.0)
        (warning,) = warnings(address)
        said = r"the clock of actor-0 on node7 is 31\d s behind the broker's: leases are not affected"
        assert re.search(said, warning), "312 s, and what the message took"
        assert status(address)["leases"]["count"] == len(held) == 2
        client.close()


def test_a_clock_that_is_a_little_off_is_not_worth_a_word(tmp_path: Path) -> None:
    with running_broker(scripted_recipe(tmp_path)) as address:
        client = Client(address, hello("actor-0"))
        client.connect(60.0)
        client.request(Heartbeat(state="generating", time=time.time() + 20.0), timeout_s=60.0)
        assert warnings(address) == []
        client.close()


def test_two_brokers_of_one_run(tmp_path: Path) -> None:
    recipe = scripted_recipe(tmp_path)
    with (
        running_broker(recipe),
        pytest.raises(UserError, match=r"^run\.name: another broker is serving"),
    ):
        serve(recipe, run_folder=recipe.folder, resume=False, stop_event=threading.Event())


# --- sent away ---------------------------------------------------------------------------------------------


def beat(client: Client) -> Pulse:
    pulse = client.request(Heartbeat(state="generating"), timeout_s=60.0).message
    assert isinstance(pulse, Pulse)
    return pulse


def test_who_is_sent_away_is_told_to_drain_until_it_has_left(tmp_path: Path) -> None:
    with running_broker(scripted_recipe(tmp_path)) as address:
        clients = [Client(address, hello(name)) for name in ("a", "b")]
        for client in clients:
            client.connect(60.0)
        person = Client(address, hello("person", "observer"))
        person.request(Drain(actors=["b"], reason="fewer"), timeout_s=60.0)
        assert [(beat(client).command, beat(client).reason) for client in clients] == [
            ("run", None),
            ("drain", "fewer"),
        ]
        clients[1].request(Goodbye(reason="leaving"), timeout_s=60.0)
        clients[1].connect(60.0)
        assert beat(clients[1]).command == "run", "who comes back was not sent away for ever"
        with pytest.raises(RefusedError, match="no actor of this run is called c"):
            person.request(Drain(actors=["a", "c"], reason="fewer"), timeout_s=60.0)
        assert beat(clients[0]).command == "run", "nothing is done by halves"


def test_the_learner_hears_which_actors_are_in_the_run(tmp_path: Path) -> None:
    with running_broker(scripted_recipe(tmp_path)) as address:
        actor, learner = Client(address, hello("a")), Client(address, hello("l", "learner"))
        actor.connect(60.0)
        learner.connect(60.0)
        assert beat(learner).actors == ["a"]
        assert beat(actor).actors is None, "nobody else needs a thousand names at each heartbeat"
        actor.request(Goodbye(reason="leaving"), timeout_s=60.0)
        assert beat(learner).actors == []
