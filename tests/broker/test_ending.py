"""Who leaves when: a run that is stopped, and one that is finished."""

from __future__ import annotations

import pytest

from broker.ending import ACTORS_S, STOP_S, Ending
from broker.members import LEFT, Members, Peer
from common.messages import Heartbeat, Hello


def crew(*roles: str) -> tuple[Members, Ending]:
    members = Members(dead_after_s=30.0, max_bad=10)
    for role in roles:
        hello = Hello(role=role, peer=role, software="0.1.0", host="h", pid=1)
        members.join(role.encode(), hello, 0.0)
    return members, Ending(members, patience_s=100.0)


def leave(members: Members, name: str, farewell: str = f"{LEFT}: told to") -> Peer:
    peer = members.peers[name]
    members.leave(peer, farewell)
    return peer


def test_a_stop_tells_actors_then_the_learner_then_lets_the_broker_go() -> None:
    members, ending = crew("actor", "learner")
    assert [ending.command(role, 0.0) for role in ("actor", "learner")] == ["run", "run"]
    ending.begin("Ctrl-C", 0.0, asked=True)
    assert [ending.command(role, 0.1) for role in ("actor", "learner", "observer")] == ["stop", "run", "stop"]
    leave(members, "actor")
    assert ending.command("learner", 0.2) == "stop"
    assert not ending.over(0.2)
    leave(members, "learner")
    assert ending.over(0.3)


def test_a_stop_waits_for_nobody_for_ever() -> None:
    _, ending = crew("actor", "learner")
    ending.begin("Ctrl-C", 0.0, asked=True)
    assert ending.command("learner", ACTORS_S + 0.1) == "stop", "an actor that is stuck"
    assert ending.over(STOP_S + 0.1)
    assert STOP_S < 10.0


@pytest.mark.parametrize("state", ["training", "publishing", "checkpointing", "waiting for groups"])
def test_a_stop_waits_for_the_learner_while_it_lives(state: str) -> None:
    """A step and a checkpoint of a large model take minutes; a stuck actor is not waited for meanwhile or after."""
    members, ending = crew("actor", "learner")
    members.heard(members.peers["learner"], Heartbeat(state=state))
    ending.begin("slipstream stop", 0.0, asked=True)
    assert not ending.over(STOP_S + 600.0)
    leave(members, "learner", "dead: not heard of for 30 s")
    assert ending.over(STOP_S + 600.1)


def test_a_stop_does_not_wait_for_a_learner_that_is_loading() -> None:
    members, ending = crew("learner")
    members.heard(members.peers["learner"], Heartbeat(state="starting"))
    ending.begin("slipstream stop", 0.0, asked=True)
    assert ending.command("learner", 0.1) == "stop"
    assert ending.over(STOP_S + 0.1)


def test_a_finished_run_keeps_its_actors_until_the_last_checkpoint_is_written() -> None:
    members, ending = crew("actor", "learner")
    ending.begin("finished", 0.0, asked=False)
    assert [ending.command(role, 1.0) for role in ("actor", "learner")] == ["run", "stop"]
    leave(members, "learner")
    assert ending.command("actor", 2.0) == "stop"
    leave(members, "actor")
    assert ending.over(3.0)


def test_a_learner_that_dies_over_its_last_checkpoint_finds_actors_when_it_is_back() -> None:
    members, ending = crew("actor", "learner")
    ending.begin("finished", 0.0, asked=False)
    leave(members, "learner", "dead: not heard of")
    assert ending.command("actor", 50.0) == "run"
    ending.cancel()  # it rewound
    assert ending.command("learner", 60.0) == "run"
    ending.begin("finished", 70.0, asked=False)
    assert ending.command("actor", 171.0) == "stop", "but not for ever"


def test_a_person_may_stop_a_finished_run_that_waits() -> None:
    _, ending = crew("actor", "learner")
    ending.begin("finished", 0.0, asked=False)
    ending.begin("Ctrl-C", 5.0, asked=True)
    ending.cancel()
    assert ending.reason is not None
    assert ending.over(5.0 + STOP_S + 0.1)


def test_the_tables_of_strangers_are_bounded() -> None:
    members = Members(dead_after_s=30.0, max_bad=10)
    for number in range(30_000):
        members.misbehaved(str(number).encode(), 0.0)
    assert len(members._strangers) <= 20_000
