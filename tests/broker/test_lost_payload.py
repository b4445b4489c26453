"""What a crash of the machine, a bad disk or a missing mount takes from a run: a little, never the run."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from broker.main import open_run
from broker.service import Service
from broker.state import load_training_set
from common.messages import Batch, Commit, Fetch, Hello, Pin, Rewind, Take
from tests.broker.test_leases import World
from tests.scripted.broker import scripted_recipe


class DurableWorld(World):
    """The same with a journal, and restarts."""

    def __init__(self, folder: Path) -> None:
        self.recipe = scripted_recipe(folder, run={"steps": 9}, broker={"durability": "journal"})
        self.now, self.numbers = 0.0, itertools.count(1)
        self.open()

    def open(self) -> None:
        """The broker starts."""
        recipe = self.recipe
        self.service = Service(open_run(recipe, recipe.folder, load_training_set(recipe), []))
        self.replies = {}
        self.learner, self.actor = self.join("learner", "learner"), self.join("a")

    def save(self) -> None:
        """What a round of the broker's loop ends with."""
        self.service.state.save()

    def crash(self, *, keep: int | None = None) -> None:
        """The broker's machine crashes: of the payloads only the first `keep` bytes were on the disk."""
        self.save()
        if keep is not None:
            for path in (self.recipe.folder / "journal").glob("payload-*.bin"):
                os.truncate(path, min(keep, path.stat().st_size))
        self.open()

    def take(self, step: int) -> Batch:
        """The answer to a take that does not wait."""
        return self.say(self.learner, Take(step=step, wait_s=0.0))

    def train(self, step: int) -> None:
        """A step from its take to its commit."""
        assert self.take(step).ready
        assert self.say(self.learner, Commit(step=step, version=step + 1, metrics={})).kind == "ack"


@pytest.fixture
def world(tmp_path: Path) -> DurableWorld:
    """A broker with eight groups for two steps in its buffer."""
    world = DurableWorld(tmp_path)
    world.say(world.learner, Rewind(step=0, version=0))
    world.answer(world.actor, world.ask(world.actor, 8), 1, 0)
    return world


def test_a_learner_that_does_not_see_the_checkpoints_does_not_undo_the_run(world: DurableWorld) -> None:
    assert world.say(world.learner, Rewind(step=0, version=0)).kind == "rewound", "there is none yet"
    world.train(0)
    world.say(world.learner, Pin(step=1, path="/run/step-1"))
    refused = world.say(world.learner, Rewind(step=0, version=0))
    assert refused.code == "conflict"
    assert "sees /run/step-1, or start the run anew with --fresh" in refused.reason
    assert world.service.state.ledger.step == 1
    assert world.say(world.learner, Rewind(step=1, version=1)).step == 1


def test_groups_that_a_crash_of_the_machine_took_are_sampled_again(world: DurableWorld) -> None:
    """The ledger's rows were on the disk and the payloads were not (`fsync = false`)."""
    world.crash(keep=1000)
    counts = world.service.state.ledger.counts()
    lost = counts["abandoned_reasons"]["damaged"]
    assert 0 < lost < 8
    assert counts["buffered"] == 8 - lost
    assert counts["sum_ok"]
    world.answer(world.actor, world.ask(world.actor, 8, era=1), 1, 0)
    world.train(0)
    world.train(1)
    assert world.service.state.ledger.counts()["sum_ok"]


def zeros_in(folder: Path, start: int) -> None:
    """A page of the payloads that was never written."""
    for path in (folder / "journal").glob("payload-*.bin"):
        content = path.read_bytes()
        path.write_bytes(content[:start] + bytes(len(content[start : start + 64])) + content[start + 64 :])


def test_a_group_that_cannot_be_read_at_its_take_is_replaced(world: DurableWorld) -> None:
    world.crash()
    zeros_in(world.recipe.folder, 200)
    batch = world.take(0)
    assert batch.ready
    assert len(batch.groups) == 4
    assert "1 groups of step 0 could not be read" in world.service.state.events[-1]["text"]
    fetched = world.say(world.learner, Fetch(groups=[header.group for header in batch.groups]))
    assert fetched.kind == "payloads"
    world.say(world.learner, Commit(step=0, version=1, metrics={}))
    counts = world.service.state.ledger.counts()
    assert counts["sum_ok"]
    assert counts["abandoned_reasons"]["damaged"] == 1


def test_a_taken_group_that_is_lost_is_no_longer_given_but_may_be_committed(world: DurableWorld) -> None:
    """The learner may have it already: then its step counts; else it takes the step again and gets others."""
    groups = [header.group for header in world.take(0).groups]
    world.crash(keep=0)
    assert world.say(world.learner, Fetch(groups=groups)).code == "stale"
    assert world.say(world.learner, Commit(step=0, version=1, metrics={})).kind == "ack"
    assert world.service.state.ledger.counts()["consumed"] == 4
    world.crash()
    assert world.take(1).ready is False
    world.answer(world.actor, world.ask(world.actor, 8, era=1, version=1), 1, 1)
    world.train(1)
    assert world.service.state.ledger.counts()["sum_ok"]


def test_a_take_that_fails_while_it_waits_costs_its_sender_an_answer_and_not_the_run_its_broker(
    world: DurableWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.train(0)
    world.train(1)
    assert world.say(world.learner, Take(step=2, wait_s=9.0)) is None

    def defect(step: int) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(world.service.state.ledger, "take", defect)
    world.settle()
    assert world.replies[world.learner][-1].code == "internal"
    monkeypatch.undo()
    world.replies.clear()
    world.settle(1.0)
    assert not world.replies, "it no longer waits"


def test_a_checkpoint_whose_commits_were_lost_is_gone_on_from(world: DurableWorld) -> None:
    """The broker was away while the learner finished its step, saved it and left."""
    world.train(0)
    taken = [header.group for header in world.take(1).groups]
    world.crash()
    ahead = world.say(world.learner, Rewind(step=3, version=3))
    assert ahead.code == "conflict", "nobody gave out the groups of step 2"
    assert world.say(world.learner, Rewind(step=2, version=2)).step == 2
    ledger = world.service.state.ledger
    assert (ledger.step, ledger.version) == (2, 2)
    assert {str(ledger.groups[key].state.name) for key in taken} == {"CONSUMED"}
    assert ledger.counts()["sum_ok"]
    era = ledger.era
    assert world.say(world.learner, Rewind(step=2, version=2)).era == era, "asked again: the same"
    world.crash()
    assert world.service.state.ledger.step == 2


def test_the_welcome_says_how_far_a_checkpoint_may_be(world: DurableWorld) -> None:
    world.train(0)
    world.take(1)
    hello = Hello(role="learner", peer="learner", software="0.1.0", host="h", pid=1)
    welcome = world.say(world.learner, hello)
    assert (welcome.step, welcome.next_step) == (1, 2)
