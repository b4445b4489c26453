"""What a crash of the machine, a bad disk or a missing mount takes from a run: a little, never the run."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from broker.main import open_run
from broker.service import Service
from broker.state import load_training_set
from common.messages import Batch, Commit, Pin, Rewind, Take
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
