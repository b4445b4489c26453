"""The publisher's state machine under every order of events that receivers and failures can produce."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common.weights.dispatch import (
    Dispatcher,
    DropLink,
    MakeOffer,
    Push,
    StartSend,
    State,
    SteerRelay,
)
from common.weights.errors import Cause

DEADLINE = 30.0


def register(
    dispatcher: Dispatcher, name: str, *, node: str | None = None, version: int | None = None
) -> None:
    body = {"actor_id": name.split(".")[0], "node": node or name, "workers": 1, "version": version}
    dispatcher.event({"event": "register", "link": name, **body}, 0.0)


def tell(dispatcher: Dispatcher, kind: str, link: str, now: float = 0.0, **fields) -> None:
    push = dispatcher.links[link].push if link in dispatcher.links else None
    extra = {"staged_s": 0.1, "stopped_ms": 1.0} if kind == "committed" else {}
    dispatcher.event({"event": kind, "link": link, "push": push, **extra, **fields}, now)


def new(degree: int = 1, count: int = 3, *, relays: bool = True) -> Dispatcher:
    dispatcher = Dispatcher(degree, DEADLINE, relays=relays)
    for index in range(count):
        register(dispatcher, f"a{index}.0")
    dispatcher.publish(Push(0, 10, 1000))
    return dispatcher


def test_a_relay_serves_its_child_once_it_holds_the_version():
    dispatcher = new(degree=1, count=2)
    assert dispatcher.actions(0.0) == [MakeOffer("a0.0", 0, None, ("a1.0",))]
    tell(dispatcher, "accepted", "a0.0")
    assert dispatcher.actions(0.0) == [StartSend("a0.0", 0)]
    tell(dispatcher, "staged", "a0.0")
    assert dispatcher.actions(0.0) == [MakeOffer("a1.0", 0, "a0.0", ())]
    tell(dispatcher, "accepted", "a1.0")
    assert dispatcher.actions(0.0) == [SteerRelay("a0.0", "a1.0", 0, go=True)]


@pytest.mark.parametrize("moment", ["offered", "receiving"])
def test_children_of_a_dead_relay_turn_to_the_learner(moment):
    dispatcher = new(degree=1, count=3)
    dispatcher.actions(0.0)
    if moment == "receiving":
        tell(dispatcher, "accepted", "a0.0")
    dispatcher.actions(0.0)
    dispatcher.drop("a0.0", Cause.PEER_LOST, "killed")
    actions = dispatcher.actions(0.0)
    assert actions == [DropLink("a0.0", "killed"), MakeOffer("a1.0", 0, None, ("a2.0",))]


def test_a_child_in_the_middle_of_a_dead_relays_transfer_is_told_to_reconnect():
    dispatcher = new(degree=1, count=2)
    dispatcher.actions(0.0)
    tell(dispatcher, "accepted", "a0.0")
    tell(dispatcher, "staged", "a0.0")
    dispatcher.actions(0.0)
    tell(dispatcher, "accepted", "a1.0")
    dispatcher.actions(0.0)
    dispatcher.drop("a0.0", Cause.DEADLINE, "frozen")
    assert [a.link for a in dispatcher.actions(0.0)] == ["a0.0", "a1.0"]
    register(dispatcher, "a1.1")
    assert dispatcher.actions(0.0) == [MakeOffer("a1.1", 0, None, ())]


def test_grandchildren_of_a_dead_relay_are_served_too():
    """Found by the state machine below: the middle one turned to the learner and left its own child behind."""
    dispatcher = new(degree=1, count=3)
    dispatcher.actions(0.0)
    dispatcher.drop("a0.0", None, "opened a new link")
    assert {link.state for link in dispatcher.links.values()} == {State.IDLE}
    assert dispatcher.actions(0.0)[-1] == MakeOffer("a1.0", 0, None, ("a2.0",))


def test_a_relay_is_told_when_its_child_is_served_otherwise():
    """Else it would keep a copy of every version until a deadline."""
    dispatcher = new(degree=1, count=2)
    dispatcher.actions(0.0)
    dispatcher.publish(Push(1, 11, 1000))
    assert SteerRelay("a0.0", "a1.0", 0, go=False) in dispatcher.actions(0.0)


def test_a_late_joiner_gets_the_newest_version_at_once():
    dispatcher = new(count=0)
    dispatcher.publish(Push(1, 11, 1000))
    register(dispatcher, "a9.0")
    assert dispatcher.actions(0.0) == [MakeOffer("a9.0", 1, None, ())]


def test_a_reconnected_actor_that_has_the_newest_version_gets_nothing():
    dispatcher = new(count=0)
    register(dispatcher, "a0.1", version=10)
    assert dispatcher.actions(0.0) == []


def test_the_learner_serves_no_more_than_the_degree_at_a_time_but_a_frozen_one_counts_only_briefly():
    dispatcher = new(degree=2, count=2)
    dispatcher.actions(0.0)
    register(dispatcher, "late.0")
    assert dispatcher.actions(0.5) == []
    assert dispatcher.actions(1.5) == [MakeOffer("late.0", 0, None, ())]


def test_stragglers_gather_into_one_tree():
    dispatcher = new(degree=1, count=1)
    dispatcher.actions(0.0)
    register(dispatcher, "b.0")
    register(dispatcher, "c.0")
    assert dispatcher.actions(0.1) == []
    for kind in ("accepted", "staged"):
        tell(dispatcher, kind, "a0.0")
    actions = dispatcher.actions(0.2)
    assert actions[-1] == MakeOffer("b.0", 0, None, ("c.0",))


def test_a_frozen_link_costs_itself_only():
    dispatcher = new(degree=4, count=3)
    dispatcher.actions(0.0)
    for name in ("a0.0", "a1.0"):
        tell(dispatcher, "accepted", name)
        tell(dispatcher, "staged", name)
        tell(dispatcher, "committed", name)
    assert [a.link for a in dispatcher.actions(0.6 * DEADLINE) if isinstance(a, DropLink)] == ["a2.0"]
    assert dispatcher.failures == {Cause.DEADLINE: 1}
    assert {link.version for link in dispatcher.links.values()} == {10}


def test_a_commit_has_longer_than_a_transfer():
    """On a GPU it may have to wait until a relay to a frozen child has reached its own deadline."""
    dispatcher = new(count=1)
    dispatcher.actions(0.0)
    for kind in ("accepted", "staged"):
        tell(dispatcher, kind, "a0.0")
    assert not any(isinstance(a, DropLink) for a in dispatcher.actions(2 * DEADLINE))
    assert [a.link for a in dispatcher.actions(3 * DEADLINE) if isinstance(a, DropLink)] == ["a0.0"]


def test_a_refused_version_is_not_offered_again_but_the_next_is():
    dispatcher = new(count=1)
    dispatcher.actions(0.0)
    tell(dispatcher, "refused", "a0.0", reason="parameter w has shape [2], the engine's has [3]")
    assert dispatcher.actions(0.0) == []
    assert dispatcher.failures == {Cause.REFUSED: 1}
    dispatcher.publish(Push(1, 11, 1000))
    assert dispatcher.actions(0.0) == [MakeOffer("a0.0", 1, None, ())]


def test_a_held_commit_has_no_deadline():
    dispatcher = new(count=1)
    dispatcher.actions(0.0)
    for kind in ("accepted", "staged", "held"):
        tell(dispatcher, kind, "a0.0")
    assert not any(isinstance(a, DropLink) for a in dispatcher.actions(1e9))
    tell(dispatcher, "committed", "a0.0")
    assert dispatcher.links["a0.0"].version == 10


def test_a_checksum_mismatch_stops_the_run_with_its_reason():
    dispatcher = new(count=1)
    dispatcher.actions(0.0)
    tell(dispatcher, "accepted", "a0.0")
    tell(dispatcher, "failed", "a0.0", cause=Cause.CHECKSUM, reason="parameter w of version 10 differs")
    assert "parameter w of version 10" in dispatcher.fatal


class Chaos(RuleBasedStateMachine):
    """Receivers that answer, fail, leave and come back in any order, while versions are published."""

    @initialize(degree=st.integers(1, 3), relays=st.booleans())
    def start(self, degree, relays):
        self.dispatcher = Dispatcher(degree, DEADLINE, relays=relays)
        self.now, self.number, self.generation = 0.0, 0, 0

    @rule(actor=st.integers(0, 4), node=st.integers(0, 2))
    def join(self, actor, node):
        self.generation += 1
        register(self.dispatcher, f"a{actor}.{self.generation}", node=f"n{node}")

    @rule()
    def publish(self):
        self.dispatcher.publish(Push(self.number, 100 + self.number, 1000))
        self.number += 1

    @precondition(lambda self: self.dispatcher.links)
    @rule(
        data=st.data(),
        kind=st.sampled_from(["accepted", "refused", "staged", "held", "committed", "failed", "bye"]),
        cause=st.sampled_from([Cause.SUPERSEDED, Cause.PEER_LOST, Cause.DEADLINE]),
    )
    def hear(self, data, kind, cause):
        link = data.draw(st.sampled_from(sorted(self.dispatcher.links)))
        expected = {"accepted": State.OFFERED, "refused": State.OFFERED, "staged": State.RECEIVING}
        expected |= {"held": State.STAGED}
        state = self.dispatcher.links[link].state
        if kind == "committed" and state not in (State.STAGED, State.HELD):
            return  # receivers commit what they have staged
        if kind in expected and state is not expected[kind]:
            return
        tell(self.dispatcher, kind, link, self.now, cause=cause, reason="chaos")

    @rule(seconds=st.floats(0.1, 40.0))
    def wait(self, seconds):
        self.now += seconds

    @rule()
    def step(self):
        for action in self.dispatcher.actions(self.now):
            if isinstance(action, MakeOffer) and action.link in self.dispatcher.links:
                assert action.push in self.dispatcher.pushes

    @invariant()
    def nobody_is_forgotten(self):
        for link in self.dispatcher.links.values():
            timed = link.state in (State.OFFERED, State.RECEIVING, State.STAGED)
            assert timed == (link.deadline < float("inf"))
            assert (link.state is State.IDLE) == (link.push is None)
            if link.state is State.WAITING:
                parent = self.dispatcher.links[link.parent]
                assert parent.push == link.push
                assert parent.state in (State.WAITING, State.OFFERED, State.RECEIVING)

    @invariant()
    def one_link_per_actor(self):
        actors = [link.actor_id for link in self.dispatcher.links.values()]
        assert len(actors) == len(set(actors))

    def teardown(self):
        """Once receivers behave again, everybody reaches the newest version."""
        if not hasattr(self, "dispatcher") or self.dispatcher.latest is None:
            return
        answers = {State.OFFERED: "accepted", State.RECEIVING: "staged"}
        answers |= {State.STAGED: "committed", State.HELD: "committed"}
        self.dispatcher.publish(Push(self.number, 100 + self.number, 1000))
        for _ in range(60):
            self.dispatcher.actions(self.now)
            for link in list(self.dispatcher.links.values()):
                if link.state in answers:
                    tell(self.dispatcher, answers[link.state], link.name, self.now)
        assert {link.version for link in self.dispatcher.links.values()} <= {100 + self.number}


Chaos.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestChaos = Chaos.TestCase
