"""Requests for work that wait at the broker: who gets what, when, and why not."""

from __future__ import annotations

import itertools
from pathlib import Path

from broker.main import open_run
from broker.service import Service
from broker.state import load_training_set
from common.codec import decode, encode
from common.messages import Commit, Goodbye, Grant, Heartbeat, Hello, Lease, Message, Publish, Rewind, Take
from tests.scripted.actor import make_group
from tests.scripted.broker import scripted_recipe


class World:
    """A service with a clock; replies by sender."""

    def __init__(self, folder: Path, **batch: int) -> None:
        recipe = scripted_recipe(folder, run={"steps": 9}, batch=batch)
        self.service = Service(open_run(recipe, recipe.folder, load_training_set(recipe), []))
        self.now, self.numbers = 0.0, itertools.count(1)
        self.replies: dict[bytes, list[Message]] = {}

    def join(self, name: str, role: str = "actor") -> bytes:
        self.say(name.encode(), Hello(role=role, peer=name, software="0.1.0", host="h", pid=1))
        return name.encode()

    def say(self, sender: bytes, message: Message, payload: list[bytes] | tuple[()] = ()) -> Message | None:
        """The answer to this message if it is there at once."""
        self.replies.pop(sender, None)
        frames = [memoryview(frame) for frame in [encode(message, next(self.numbers)), *payload]]
        self.service.receive(sender, frames, self.now)
        self.settle()
        return self.replies.get(sender, [None])[-1]

    def settle(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.service.settle(self.now)
        for reply in self.service.outbox.empty():
            self.replies.setdefault(reply.origin.connection, []).append(decode(reply.frames[0])[0])

    def ask(
        self, actor: bytes, capacity: int, *, era: int = 0, version: int = 0, wait_s: float = 5.0
    ) -> Grant | None:
        return self.say(actor, Lease(capacity=capacity, era=era, version=version, wait_s=wait_s))

    def answer(self, actor: bytes, grant: Grant, era: int, version: int) -> None:
        for assignment in grant.groups:
            name = actor.decode()
            header, payload = make_group(assignment, actor=name, era=era, versions=(version,), tokens=4)
            assert self.say(actor, Publish(header=header), payload).status == "accepted"


def test_the_first_to_come_leaves_some_to_the_others(tmp_path: Path) -> None:
    world = World(tmp_path)
    one, two = world.join("one"), world.join("two")
    assert len(world.ask(one, 100).groups) == 4, "half of the two steps of four"
    assert len(world.ask(two, 100).groups) == 4
    assert world.ask(one, 100) is None, "it waits"


def test_a_wait_ends_with_a_reason(tmp_path: Path) -> None:
    world = World(tmp_path)
    one = world.join("one")
    world.ask(one, 100)
    assert world.ask(one, 1, wait_s=2.0) is None
    world.settle(1.9)
    assert world.replies.get(one) is None
    world.settle(0.2)
    (refusal,) = world.replies[one]
    assert refusal.groups == []
    assert (
        refusal.reason == "the buffer is full (8 groups in flight or buffered): waiting for a learner to join"
    )


def test_those_who_wait_get_work_in_the_order_in_which_they_came(tmp_path: Path) -> None:
    world = World(tmp_path, max_staleness=2)
    actors = [world.join(f"actor-{i}") for i in range(3)]
    grants = [world.ask(actor, 4) for actor in actors]
    learner = world.join("learner", "learner")
    era = world.say(learner, Rewind(step=0, version=0)).era
    for actor, grant in zip(actors, grants, strict=True):
        world.answer(actor, grant, 0, 0)
    for actor in reversed(actors):
        assert world.ask(actor, 4, era=era, version=0) is None
    assert world.say(learner, Take(step=0, wait_s=0.0)).ready
    world.say(learner, Commit(step=0, version=1, metrics={}))
    assert all(world.replies.get(actor) is None for actor in actors), "their weights are too old for step 3"
    world.say(actors[2], Heartbeat(state="waiting", era=era, version=1))
    assert [type(reply).__name__ for reply in world.replies[actors[2]]] == ["Pulse", "Grant"]
    assert len(world.replies[actors[2]][1].groups) == 4, "new weights came while it waited"
    assert world.replies.get(actors[0]) is None


def test_an_actor_that_had_to_connect_anew_gets_its_grant_there(tmp_path: Path) -> None:
    """Its request still waits under the old connection: what is granted to that one is lost."""
    world = World(tmp_path)
    one, other = world.join("one"), world.join("other")
    for actor in (one, other):
        assert len(world.ask(actor, 100).groups) == 4
    assert world.ask(one, 4, wait_s=60.0) is None
    world.say(b"one, again", Hello(role="actor", peer="one", software="0.1.0", host="h", pid=1))
    assert world.ask(b"one, again", 4, wait_s=60.0) is None
    world.say(other, Goodbye(reason="leaving"))
    assert world.replies.get(one) is None
    assert len(world.replies[b"one, again"][0].groups) == 4


def test_a_grant_that_was_lost_with_its_connection_is_given_again(tmp_path: Path) -> None:
    world = World(tmp_path)
    one = world.join("one")
    world.numbers = itertools.repeat(7)  # asked again, under the same number
    lost = world.ask(one, 2)
    world.say(b"one, again", Hello(role="actor", peer="one", software="0.1.0", host="h", pid=1))
    assert world.ask(b"one, again", 2) == lost
    assert world.service.state.ledger.counts()["in_flight"] == 2


def test_a_policy_that_does_not_exist_gets_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    one = world.join("one")
    assert world.ask(one, 1, version=3, wait_s=0.0).reason.startswith(
        "waiting for weights: version 3 of era 0"
    )
    assert world.ask(one, 1, era=2, wait_s=0.0).groups == []
