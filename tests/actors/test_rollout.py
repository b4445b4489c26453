"""The rollout: every leased group is published once or handed back, whatever the broker and the engine do."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from actor_fakes import FakeEngine, FakeGrader, FakeWeights, FakeWire, prompts
from hypothesis import given, settings
from hypothesis import strategies as st

from actors import rollout as rollout_module
from actors.engine import EngineLostError, Sampling
from actors.meters import Meters
from actors.policy import Policy
from actors.rollout import Limits, Rollout
from actors.scoring import Scorer
from common.messages import Ack, EvalJob, Grant, Refused
from common.wire import RefusedError

HERE = Path(__file__).parent


def no_waits(setattr_) -> None:
    setattr_(rollout_module, "RETRY_S", 0.001)
    setattr_(rollout_module, "LOOK_S", 0.001)


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch):
    no_waits(monkeypatch.setattr)


class World:
    """A rollout among fakes."""

    def __init__(self, questions: int, *, sequences: int = 16, group_size: int = 4) -> None:
        self.wire, self.engine = FakeWire(questions, group_size), FakeEngine()
        self.meters, self.policy = Meters(), Policy()
        self.limits = Limits(sequences, sequences + group_size, group_size, prompt_tokens=20, max_staleness=1)
        self.evaluations: list[EvalJob] = []
        self.rollout = Rollout(
            self.wire,
            "a",
            self.engine,
            prompts=prompts(),
            scorer=Scorer(FakeGrader()),
            policy=self.policy,
            weights=FakeWeights(),
            meters=self.meters,
            sampling=Sampling(1.0, 8),
            limits=self.limits,
            on_evaluation=self.evaluations.append,
        )

    async def until(self, condition, seconds: float = 60.0) -> None:
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110 - a condition of the fakes
                await asyncio.sleep(0)


@asynccontextmanager
async def running(world: World):
    task = asyncio.create_task(world.rollout.run())
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, EngineLostError, RefusedError):
            await task


@settings(max_examples=25, deadline=None)
@given(
    questions=st.integers(0, 60),
    sequences=st.integers(1, 40),
    group_size=st.integers(1, 9),
    refusals=st.lists(
        st.sampled_from(["not_now", "full", "conflict", "expired", "duplicate", "filtered"]), max_size=20
    ),
)
def test_every_group_is_handed_over_once_whatever_the_broker_says(questions, sequences, group_size, refusals):
    async def scenario():
        world = World(questions, sequences=sequences, group_size=group_size)
        left = list(refusals)

        def answer(header):
            code = left.pop() if left else "accepted"
            if code in ("not_now", "full", "conflict"):
                return Refused(code=code, reason="scripted")
            return Ack(status=code)

        world.wire.publish = answer
        async with running(world):
            counts = world.meters.counts
            ended = ("accepted", "duplicate", "filtered", "expired", "refused")
            await world.until(lambda: sum(counts[f"groups_{name}"] for name in ended) == questions)
            await world.until(lambda: not world.rollout.leases)
        used = refusals[len(left) :]
        assert counts["groups_refused"] == used.count("conflict")
        assert set(world.wire.accepted.values()) <= {1}
        assert sum(world.wire.accepted.values()) == questions - counts["groups_refused"]
        assert world.engine.most <= world.limits.sequences_leased
        assert world.rollout.backlog == 0

    asyncio.run(scenario())


def test_a_published_group_says_what_was_sampled():
    async def scenario():
        world = World(1)
        world.policy.era = 3
        async with running(world):
            await world.until(lambda: world.wire.headers)
        (header,) = world.wire.headers
        assert (header.group, header.lease, header.era, header.actor) == ((0, 0), 1, 3, "a")
        assert header.prompt_tokens == len("1+1=") + 1
        assert [r.tokens for r in header.responses] == [1, 2, 3, 4]
        assert [r.verdict for r in header.responses] == ["wrong", "correct", "wrong", "correct"]
        assert [r.reward for r in header.responses] == [0.0, 1.0, 0.0, 1.0]

    asyncio.run(scenario())


def test_era_of_a_group_is_that_of_its_start():
    async def scenario():
        world = World(1)
        world.engine.hold = asyncio.Event()
        async with running(world):
            await world.until(lambda: world.engine.unfinished)
            world.policy.era = 1  # the learner rewound while the group was sampled
            world.engine.hold.set()
            await world.until(lambda: world.wire.headers)
        assert world.wire.headers[0].era == 0

    asyncio.run(scenario())


def test_generation_goes_on_while_the_broker_is_away_and_what_waits_is_bounded():
    async def scenario():
        world = World(10_000)
        world.wire.publish = lambda header: Refused(code="full", reason="disk full")
        async with running(world):
            await world.until(lambda: world.rollout.backlog >= world.limits.groups_kept)
            for _ in range(300):
                await asyncio.sleep(0)
            most = world.limits.groups_kept + world.limits.sequences_leased // world.limits.group_size
            assert world.limits.groups_kept <= len(world.rollout.leases) <= most
            world.wire.publish = lambda header: Ack(status="accepted")
            world.wire.questions = 0
            await world.until(lambda: not world.rollout.leases)

    asyncio.run(scenario())


def test_prompts_that_are_too_long_go_back_with_the_reason():
    async def scenario():
        world = World(2)
        world.wire.problem = "9" * 30
        async with running(world):
            await world.until(lambda: len(world.wire.released) == 2)
        assert all("31 tokens" in reason for reason in world.wire.released.values())
        assert not world.wire.accepted
        assert not world.rollout.leases

    asyncio.run(scenario())


def test_nothing_is_leased_for_weights_that_are_too_old():
    async def scenario():
        world = World(3)
        world.policy.version, world.rollout.newest_version = 5, 7
        async with running(world):
            await world.until(lambda: world.rollout.waiting)
            assert world.rollout.waiting.whom == "weights: version 7"
            assert not world.wire.counts["lease"]
            world.policy.version = 6  # one behind is what max_staleness = 1 allows
            await world.until(lambda: sum(world.wire.accepted.values()) == 3)

    asyncio.run(scenario())


def test_says_what_it_waits_for():
    async def scenario():
        world = World(0)
        world.wire.lease_reply = lambda message: Grant(groups=[], reason="the buffer is full")
        async with running(world):
            await world.until(lambda: world.rollout.waiting)
            assert world.rollout.waiting.whom == "broker: the buffer is full"
            since = world.rollout.waiting.since
            for _ in range(20):
                await asyncio.sleep(0)
            assert world.rollout.waiting.since == since

    asyncio.run(scenario())


def test_drain_finishes_what_it_can_and_hands_back_the_rest():
    async def scenario():
        world = World(100)
        async with running(world):
            await world.until(lambda: sum(world.wire.accepted.values()) > 10)
            world.engine.hold = asyncio.Event()  # what enters from now on takes for ever
            await world.until(lambda: world.engine.unfinished >= 12)
            await world.until(lambda: not world.rollout.backlog)
            held = set(world.rollout.leases)
            await world.rollout.drain(0.05, "leaving")
        assert held
        assert held <= set(world.wire.released)
        assert not set(world.wire.released) & set(world.wire.accepted)
        given = 100 - world.wire.questions
        assert len(world.wire.released) + len(world.wire.accepted) == given
        assert not world.rollout.leases
        assert world.engine.unfinished == 0

    asyncio.run(scenario())


def test_drain_waits_for_what_is_in_flight():
    async def scenario():
        world = World(8)
        world.engine.ticks = 200
        async with running(world) as task:
            await world.until(lambda: world.engine.unfinished)
            await world.rollout.drain(20.0, "leaving")
            await task
        assert not world.wire.released
        assert sum(world.wire.accepted.values()) == 8 - world.wire.questions > 0

    asyncio.run(scenario())


def test_a_grant_that_arrives_while_draining_goes_back():
    async def scenario():
        world = World(0)
        gate, asked = asyncio.Event(), asyncio.Event()

        async def late(message, payload):
            asked.set()
            await gate.wait()
            return Grant(groups=[world.wire.assignment()])

        world.wire._lease = late
        async with running(world) as task:
            await asked.wait()
            await world.rollout.drain(1.0, "leaving")
            gate.set()
            await task
        assert list(world.wire.released.values()) == ["the actor is leaving"]

    asyncio.run(scenario())


def test_a_dead_engine_ends_the_rollout():
    async def scenario():
        world = World(4)
        world.engine.failure = EngineLostError("gone")
        async with running(world) as task:
            with pytest.raises(EngineLostError):
                await task

    asyncio.run(scenario())


def test_an_actor_that_is_shut_out_says_so():
    async def scenario():
        world = World(4)
        world.wire.lease_reply = lambda message: Refused(code="shut_out", reason="100 bad messages")
        async with running(world) as task:
            with pytest.raises(RefusedError, match="100 bad messages"):
                await task

    asyncio.run(scenario())


def test_evaluations_are_passed_on():
    async def scenario():
        world = World(1)
        world.wire.evaluation = EvalJob(
            job=1, requested=0, questions=[], samples=0, temperature=1.0, max_tokens=8
        )
        async with running(world):
            await world.until(lambda: world.evaluations and world.wire.accepted)
        assert world.evaluations[0].job == 1

    asyncio.run(scenario())


def objects_after(groups: int) -> int:
    """Python objects alive after that many groups."""

    async def scenario() -> int:
        world = World(groups)
        world.wire.keep_headers = False
        async with running(world):
            await world.until(lambda: world.meters.counts["groups_accepted"] == groups, seconds=500)
            await world.until(lambda: not world.rollout.leases)
            world.wire.accepted.clear()
            gc.collect()
            return len(gc.get_objects()) + len(asyncio.all_tasks())

    return asyncio.run(scenario())


def growth(short: int, long: int) -> int:
    """How many more objects a longer run leaves, counted in a process where nothing else goes on."""
    code = (
        "import test_rollout as t; t.no_waits(setattr); t.objects_after(50)\n"
        f"print(-t.objects_after({short}) + t.objects_after({long}))"
    )
    folders = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": folders},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_long_run_leaves_no_growing_state():
    assert growth(100, 600) < 25  # of 500 more groups not one object stays


@pytest.mark.nightly
def test_a_very_long_run_leaves_no_growing_state():
    assert growth(1000, 200_000) < 100
