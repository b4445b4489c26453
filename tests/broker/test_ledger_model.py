"""The ledger against a model: actors join, die, are slow, publish twice, lag; the learner restarts; versions rewind.

After every rule: I1 (no trained token too old), I2 (each question once in the surviving history), I3 (the sum, from
an independent recount), and a journal that is closed and opened again at any point equals the ledger in memory.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from broker.group import Facts, LedgerError, Rules, State
from broker.journal import Journal
from broker.ledger import Ledger
from broker.store import Entry
from common.messages import GroupId

ACTORS = ("a", "b")
PAYLOAD = (b"1234", b"56", b"7")


class Actor:
    """What an actor knows: the policy that it holds, and its leases (key, lease number, policy at the lease)."""

    def __init__(self, era: int, version: int) -> None:
        self.era, self.version = era, version
        self.leases: list[tuple[GroupId, int, int, int]] = []


class HonestModel(RuleBasedStateMachine):
    """Living actors, as slow and as far behind as may be: nothing ever expires, so nothing is selected against."""

    durable = False
    honest = True

    @initialize(
        staleness=st.integers(0, 3),
        per_step=st.integers(1, 2),
        questions=st.integers(3, 12),
        epochs=st.integers(1, 3),
        zero_variance=st.sampled_from(["count", "train", "refill"]),
    )
    def begin(self, staleness: int, per_step: int, questions: int, epochs: int, zero_variance: str) -> None:
        self.rules = Rules(
            questions=questions,
            groups_per_step=per_step,
            steps=20,
            max_staleness=staleness,
            max_epochs=epochs,
            max_attempts=3,
            lease_s=50.0,
            unlisted_s=20.0,
            zero_variance=zero_variance,
        )
        self.ledger = Ledger(self.rules)
        self.now = 0.0
        self.actors = {name: Actor(0, 0) for name in ACTORS}
        self.policies = {(0, 0)}  # (era, version) of the surviving history, kept independently of the ledger
        self.trained: list[
            list[tuple[GroupId, int]]
        ] = []  # per step of the surviving history: (group, oldest)
        self.sent: list[Facts] = []
        self.in_hand: dict[int, list[GroupId]] = {}
        self.folder = Path(tempfile.mkdtemp()) if self.durable else None
        self.journal = Journal(self.folder) if self.folder else None

    # --- actors --------------------------------------------------------------------------------------------

    def behind(self) -> list[str]:
        now = (self.ledger.era, self.ledger.version)
        return [name for name, actor in self.actors.items() if (actor.era, actor.version) != now]

    def busy(self) -> list[str]:
        return [name for name, actor in self.actors.items() if actor.leases]

    @precondition(lambda self: self.behind())
    @rule(data=st.data())
    def get_weights(self, data: st.DataObject) -> None:
        actor = self.actors[data.draw(st.sampled_from(self.behind()))]
        actor.era, actor.version = self.ledger.era, self.ledger.version

    @precondition(lambda self: self.ledger.finished)
    @rule()
    def nothing_is_left_to_do(self) -> None:
        assert (
            self.ledger.lease("a", 10, era=self.ledger.era, version=self.ledger.version, now=self.now) == []
        )

    def may_lease(self) -> list[str]:
        return [name for name, actor in self.actors.items() if self.ledger.room(actor.version)]

    @precondition(lambda self: self.may_lease())
    @rule(data=st.data(), capacity=st.integers(1, 4))
    def lease(self, data: st.DataObject, capacity: int) -> None:
        name = data.draw(st.sampled_from(self.may_lease()))
        actor = self.actors[name]
        granted = self.ledger.lease(name, capacity, era=actor.era, version=actor.version, now=self.now)
        assert len(granted) <= capacity
        assert not granted or (actor.era, actor.version) in self.policies
        actor.leases += [(group.key, group.lease, actor.era, actor.version) for group in granted]

    @precondition(lambda self: self.busy())
    @rule(data=st.data(), zero=st.booleans(), fresh=st.booleans(), twice=st.booleans(), lie=st.integers(0, 2))
    def publish(self, data: st.DataObject, zero: bool, fresh: bool, twice: bool, lie: int) -> None:
        """`fresh`: a swap came in while the group was sampled, so that it has tokens of the actor's version now.

        `lie` (not in honest runs): tokens are older than the version that the lease was granted for.
        """
        name = data.draw(st.sampled_from(self.busy()))
        actor = self.actors[name]
        key, lease, era, version = actor.leases.pop(data.draw(st.integers(0, len(actor.leases) - 1)))
        newest = actor.version if fresh and actor.era == era else version
        oldest = version if self.honest else max(0, version - lie)
        facts = Facts(key, lease, name, era, oldest, newest, 0.5, 10, zero)
        self._publish(facts)
        if twice:
            assert self._publish(facts) in ("duplicate", "expired")

    def _publish(self, facts: Facts) -> str:
        status = self.ledger.publish(facts).status
        assert status not in ("unknown", "future")
        if status == "accepted" and self.journal:
            self.journal.put(facts.key, Entry(repr(facts).encode(), PAYLOAD))
        self.sent.append(facts)
        return status

    # --- learner -------------------------------------------------------------------------------------------

    def may_take(self) -> bool:
        ready = len(self.ledger._ready) >= self.rules.groups_per_step
        return ready and self.ledger.next_step <= self.ledger.step + 1 and not self.ledger.finished

    @precondition(lambda self: self.may_take())
    @rule()
    def take(self) -> None:
        step = self.ledger.next_step
        groups = self.ledger.take(step)
        if groups is None:
            return
        assert len(groups) == self.rules.groups_per_step
        assert groups == self.ledger.take(step), "the same step again gives the same groups"
        for group in groups:
            if group.state == State.TAKEN:
                assert step - group.oldest <= self.rules.max_staleness, "I1"
                assert (group.era, group.newest) in self.policies
                assert self.journal is None or self.journal.kept(group.key)
        self.in_hand[step] = [group.key for group in groups]

    @precondition(lambda self: self.ledger.step in self.in_hand)
    @rule(again=st.booleans())
    def commit(self, again: bool) -> None:
        step = self.ledger.step
        groups = self.ledger.commit(step, step + 1)
        assert [group.key for group in groups] == self.in_hand.pop(step)
        self.policies.add((self.ledger.era, step + 1))
        self.trained.append([(group.key, group.oldest) for group in groups])
        if self.journal:
            self.journal.consumed(group.key for group in groups if group.state == State.CONSUMED)
        if again:
            assert self.ledger.commit(step, step + 1) == []

    # --- invariants ----------------------------------------------------------------------------------------

    @invariant()
    def i2_each_question_once(self) -> None:
        if not hasattr(self, "ledger"):
            return
        keys = [key for step in self.trained for key, _ in step]
        assert len(keys) == len(set(keys))
        states = {group.key: group for group in self.ledger.groups.values()}
        for step, groups in enumerate(self.trained):
            for key, _ in groups:
                assert states[key].step == step
                assert states[key].state in (State.CONSUMED, State.FILTERED)
        consumed = [key for key, group in states.items() if group.state == State.CONSUMED]
        assert set(consumed) <= set(keys)

    @invariant()
    def i3_the_sum(self) -> None:
        if not hasattr(self, "ledger"):
            return
        counts = self.ledger.counts()
        assert counts["sum_ok"]
        found = Counter(group.state for group in self.ledger.groups.values())
        assert counts["in_flight"] == found[State.LEASED]
        assert counts["buffered"] == found[State.BUFFERED]
        assert counts["consumed"] == found[State.CONSUMED]
        assert counts["leased"] == sum(group.lease for group in self.ledger.groups.values())
        assert self.ledger.untaken == found[State.LEASED] + len(self.ledger._ready)

    @invariant()
    def admission_is_bounded(self) -> None:
        if hasattr(self, "ledger") and self.honest:
            bound = (self.rules.max_staleness + 1) * self.rules.groups_per_step
            assert self.ledger.untaken <= bound

    @invariant()
    def the_honest_lose_nothing(self) -> None:
        if hasattr(self, "ledger") and self.honest:
            assert self.ledger.expired == 0
            assert self.ledger.abandoned.keys() <= {"end of the run"}

    def teardown(self) -> None:
        if getattr(self, "journal", None) is not None:
            self.journal.close()
            shutil.rmtree(self.folder)


class LedgerModel(HonestModel):
    """Actors die, come back, hand back, fall silent and lie about versions; the learner restarts and rewinds."""

    honest = False

    @rule(name=st.sampled_from(ACTORS))
    def die_or_join(self, name: str) -> None:
        if self.actors.pop(name, None) is not None:
            self.ledger.drop_actor(name, "actor dead")
        else:
            self.actors[name] = Actor(self.ledger.era, self.ledger.version)

    @precondition(lambda self: self.sent)
    @rule(pick=st.integers(0, 50))
    def publish_again_later(self, pick: int) -> None:
        """A lost ACK, much later: it changes nothing."""
        before = self.ledger.counts()
        facts = self.sent[pick % len(self.sent)]
        group = self.ledger.groups[facts.key]
        if facts.lease != group.lease or group.state != State.LEASED:
            assert self._publish(facts) in ("duplicate", "expired")
            assert self.ledger.counts() == before

    @precondition(lambda self: self.busy())
    @rule(data=st.data(), draining=st.booleans())
    def hand_back(self, data: st.DataObject, draining: bool) -> None:
        name = data.draw(st.sampled_from(self.busy()))
        keys = [key for key, *_ in self.actors[name].leases]
        self.ledger.release(name, keys, "why", "leaving" if draining else "failed")
        self.actors[name].leases.clear()

    @rule(seconds=st.sampled_from([1.0, 15.0, 30.0, 60.0]), listed=st.booleans())
    def time_passes(self, seconds: float, listed: bool) -> None:
        self.now += seconds
        if listed:
            for name, actor in self.actors.items():
                self.ledger.renew(name, [key for key, *_ in actor.leases], self.now)
        self.ledger.tick(self.now, lambda name: name in self.actors)

    @precondition(lambda self: self.in_hand)
    @rule(data=st.data())
    def a_taken_group_cannot_be_read(self, data: st.DataObject) -> None:
        """Its step, and those after it, are undone, and its question is asked again."""
        step = data.draw(st.sampled_from(sorted(self.in_hand)))
        groups = self.ledger.taken[step]
        lost = data.draw(st.sampled_from([group.key for group in groups]))
        published = self.ledger.groups[lost].state == State.TAKEN
        self.ledger.untake(step)
        self.ledger.lose([lost])
        for later in [later for later in self.in_hand if later >= step]:
            del self.in_hand[later]
        assert self.ledger.next_step == step
        assert (self.ledger.groups[lost].state == State.PENDING) is published

    @rule(ahead=st.integers(1, 3), kept=st.booleans())
    def rewind_to_a_checkpoint_ahead(self, ahead: int, kept: bool) -> None:
        """The commits of its steps were lost: what was taken for them counts as trained, what was not is refused."""
        step = self.ledger.step + ahead
        if step > self.ledger.next_step:
            before = copy.deepcopy((self.ledger.meta(), self.ledger.groups))
            assert self.ledger.catch_up(step) == []
            with pytest.raises(LedgerError, match="is ahead of this broker's ledger"):
                self.ledger.rewind(step, step, lambda key: kept)
            assert (self.ledger.meta(), self.ledger.groups) == before
            return
        steps = [self.in_hand.pop(done) for done in range(self.ledger.step, step)]
        groups = self.ledger.catch_up(step)
        assert [group.key for group in groups] == [key for keys in steps for key in keys]
        self.trained += [[(key, self.ledger.groups[key].oldest) for key in keys] for keys in steps]
        if self.journal:
            self.journal.consumed(group.key for group in groups if group.state == State.CONSUMED)
        assert self.ledger.step == step
        self._rewind(step, kept)

    @rule(back=st.integers(0, 4), kept=st.booleans())
    def rewind(self, back: int, kept: bool) -> None:
        self._rewind(max(0, self.ledger.step - back), kept)

    def _rewind(self, step: int, kept: bool) -> None:
        keeps = self.journal.kept if self.journal else lambda key: kept
        self.ledger.rewind(step, step, keeps)
        self.policies = {(era, version) for era, version in self.policies if version <= step}
        self.policies |= {(self.ledger.era, version) for version in range(step + 1)}
        del self.trained[step:]
        self.in_hand.clear()
        assert self.ledger.version == step


class JournalModel(LedgerModel):
    """The same with a journal under it that is closed and opened again at any point."""

    durable = True

    @rule(back=st.integers(0, 3))
    def pin(self, back: int) -> None:
        self.journal.pin(max(0, self.ledger.step - back), self.ledger)

    @rule(crash=st.booleans())
    def save_and_restart(self, crash: bool) -> None:
        """The broker dies right after a save: what comes back equals what was there."""
        self.journal.save(self.ledger, None)
        kept = {key: self.journal.kept(key) for key in self.ledger.groups}
        self.journal.close()
        self.journal = Journal(self.folder)
        restored = self.journal.load(self.rules)
        assert_equal(restored, self.ledger)
        assert {key: self.journal.kept(key) for key in restored.groups} == kept
        for key in (key for key, there in kept.items() if there):
            assert [bytes(part) for part in self.journal.get(key).payload] == list(PAYLOAD)
        restored.restart_clocks(self.now)
        self.ledger = restored
        self.saved = copy.deepcopy(restored)

    def teardown(self) -> None:
        """However the example ended, it crashes now: what comes back is what was saved last."""
        if getattr(self, "saved", None) is not None:
            again = Journal(self.folder)
            assert_equal(again.load(self.rules), self.saved)
            again.close()
        super().teardown()


def assert_equal(one: Ledger, other: Ledger) -> None:
    assert one.meta() == other.meta()
    assert one.groups == other.groups
    assert one.counts() == other.counts()
    assert {k: [g.key for g in v] for k, v in one.taken.items()} == {
        k: [g.key for g in v] for k, v in other.taken.items()
    }
    assert one._due == other._due
    assert one._ready.keys() == other._ready.keys()
    assert one._leased.keys() == other._leased.keys()


SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
LedgerModel.TestCase.settings = settings(
    max_examples=100, stateful_step_count=50, deadline=None, suppress_health_check=SLOW
)
JournalModel.TestCase.settings = settings(
    max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=SLOW
)
HonestModel.TestCase.settings = settings(
    max_examples=100, stateful_step_count=60, deadline=None, suppress_health_check=SLOW
)
TestLedger = LedgerModel.TestCase
TestJournal = JournalModel.TestCase
TestHonest = HonestModel.TestCase
