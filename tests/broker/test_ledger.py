"""The ledger and its arithmetic, case by case."""

from __future__ import annotations

from collections import Counter
from itertools import permutations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import staleness
from broker.group import Facts, Group, LedgerError, Rules, State
from broker.ledger import Ledger
from broker.order import epoch_order


def make(**changes: object) -> Ledger:
    rules = {"questions": 30, "groups_per_step": 1, "steps": 20, "max_staleness": 1, "max_attempts": 2}
    return Ledger(Rules(**{**rules, **changes}))


def lease(ledger: Ledger, count: int = 1, *, version: int | None = None, actor: str = "a") -> list[Group]:
    at = ledger.version if version is None else version
    return ledger.lease(actor, count, era=ledger.era, version=at, now=0.0)


def publish(ledger: Ledger, group: Group, **changes: object) -> str:
    facts = Facts(group.key, group.lease, group.actor, group.era, group.oldest, group.newest, 0.5, 10, False)
    return ledger.publish(facts._replace(**changes)).status


def train(ledger: Ledger) -> list[Group]:
    step = ledger.step
    groups = ledger.take(step)
    assert groups is not None
    ledger.commit(step, step + 1)
    return groups


# --- arithmetic --------------------------------------------------------------------------------------------


def feasible(deadlines: tuple[int, ...], next_step: int, per_step: int) -> bool:
    """By exhaustion: is there any order of the groups in which each is trained in time?"""
    return any(
        all(next_step + place // per_step <= due for place, due in enumerate(order))
        for order in permutations(deadlines)
    )


@pytest.mark.parametrize("per_step", [1, 2])
def test_admission_keeps_exactly_what_a_schedule_exists_for(per_step: int) -> None:
    """`room` > 0 exactly when one more group leaves a schedule, for every small case; enumeration, not theory."""
    for count in range(5):
        for deadlines in product(range(4), repeat=count):
            if not feasible(deadlines, 0, per_step):
                continue
            for version in range(4):
                room = staleness.room(
                    Counter(deadlines),
                    version=version,
                    next_step=0,
                    last_step=100,
                    groups_per_step=per_step,
                    max_staleness=0,
                )
                assert (room > 0) == feasible((*deadlines, version), 0, per_step)


@given(
    staleness_bound=st.integers(0, 5),
    per_step=st.integers(1, 9),
    step=st.integers(0, 50),
    waiting=st.integers(0, 60),
)
def test_with_current_actors_it_is_the_inequality_of_the_design(
    staleness_bound: int, per_step: int, step: int, waiting: int
) -> None:
    room = staleness.room(
        Counter({step + staleness_bound: waiting}),
        version=step,
        next_step=step,
        last_step=1000,
        groups_per_step=per_step,
        max_staleness=staleness_bound,
    )
    assert room == max(0, (staleness_bound + 1) * per_step - waiting)


@given(seed=st.integers(0, 2**32), epoch=st.integers(0, 30), size=st.integers(1, 200))
def test_each_epoch_is_a_permutation(seed: int, epoch: int, size: int) -> None:
    assert sorted(epoch_order(seed, epoch, size)) == list(range(size))


def test_the_order_never_changes() -> None:
    """A resumed run on another machine must go on in the same order: the values are written down."""
    assert epoch_order(42, 0, 10).tolist() == ORDER_OF_SEED_42
    assert epoch_order(42, 1, 10).tolist() != ORDER_OF_SEED_42


ORDER_OF_SEED_42 = [4, 8, 1, 9, 3, 6, 0, 7, 2, 5]


# --- staleness ---------------------------------------------------------------------------------------------


def test_a_step_waits_for_a_slow_response_instead_of_letting_it_expire() -> None:
    """A younger group that is ready does not overtake one in flight that would then be too old."""
    ledger = make()
    first, slow = lease(ledger, 2)
    publish(ledger, first)
    train(ledger)
    (young,) = lease(ledger, 1, actor="b")
    publish(ledger, young)
    assert ledger.take(1) is None
    lacking, urgent = ledger.missing()
    assert (lacking, urgent) == (0, [slow])
    assert publish(ledger, slow) == "accepted"
    assert ledger.take(1) == [slow]
    assert ledger.expired == 0


def test_a_dead_actor_does_not_hold_the_step_up() -> None:
    ledger = make()
    first, lost = lease(ledger, 2)
    publish(ledger, first)
    train(ledger)
    (young,) = lease(ledger, 1, actor="b")
    publish(ledger, young)
    assert ledger.drop_actor("a", "actor dead") == 1
    assert ledger.take(1) == [young]
    assert lost.state == State.PENDING


def test_the_sweep_catches_what_admission_could_not_foresee() -> None:
    """A token older than the lease promised: accepted while young enough, swept when its time is over."""
    ledger = make(max_staleness=2)
    for _ in range(2):
        publish(ledger, *lease(ledger, 1))
        train(ledger)
    one, other = lease(ledger, 2)
    publish(ledger, one, oldest=0)
    publish(ledger, other, oldest=0)
    assert train(ledger) == [min(one, other, key=lambda group: group.order)]
    assert ledger.take(3) is None
    assert ledger.expired == 1
    assert ledger.counts()["sum_ok"]
    assert ledger.states[State.PENDING] == 1


def test_a_group_that_arrives_too_old_expires_and_its_question_lives_on() -> None:
    ledger = make()
    (late,) = lease(ledger, 1)
    ledger.tick(1e9, lambda name: False)
    for _ in range(2):
        (group,) = lease(ledger, 1, actor="b")
        publish(ledger, group)
        train(ledger)
    (again,) = lease(ledger, 1, actor="b")
    assert publish(ledger, again, oldest=0) == "expired"
    assert ledger.expired == 1
    assert lease(ledger, 1)[0].key == again.key, "a returned question comes first"
    assert late.lease == 2 or late.state != State.LEASED


def test_zero_staleness_is_synchronous() -> None:
    """Nothing is sampled while a step is trained, and steps follow the order of the questions exactly."""
    ledger = make(max_staleness=0, groups_per_step=3)
    order = epoch_order(42, 0, 30).tolist()
    for step in range(4):
        groups = lease(ledger, 10)
        assert len(groups) == 3
        for group in reversed(groups):
            publish(ledger, group)
        taken = ledger.take(step)
        assert [group.key.index for group in taken] == order[3 * step : 3 * step + 3]
        assert lease(ledger, 10) == []
        ledger.commit(step, step + 1)
        assert lease(ledger, 10, version=step) == [], "old weights get no work"


# --- leases ------------------------------------------------------------------------------------------------


def test_a_void_lease_changes_nothing_even_when_the_question_is_leased_again() -> None:
    ledger = make()
    (group,) = lease(ledger, 1)
    void = Facts(group.key, group.lease, "a", 0, 0, 0, 0.5, 10, False)
    ledger.tick(1e9, lambda name: False)
    assert lease(ledger, 1)[0] is group
    assert ledger.publish(void).status == "expired"
    assert group.state == State.LEASED
    assert publish(ledger, group) == "accepted"
    assert ledger.publish(void).status == "expired"


def test_a_lease_of_another_or_of_nobody_is_refused() -> None:
    ledger = make()
    (group,) = lease(ledger, 1)
    assert publish(ledger, group, actor="thief") == "unknown"
    assert publish(ledger, group, lease=7) == "unknown"
    assert publish(ledger, group, newest=1) == "future"
    assert group.state == State.LEASED


@pytest.mark.parametrize(
    ("silent", "alive", "ends"),
    [(10.0, True, False), (31.0, True, True), (31.0, False, False), (601.0, False, True)],
)
def test_leases_end_when_nobody_works_on_them(silent: float, alive: bool, ends: bool) -> None:
    ledger = make()
    lease(ledger, 1)
    assert bool(ledger.tick(silent, lambda name: alive)) == ends


def test_a_lease_that_is_named_in_heartbeats_lives_but_not_for_ever() -> None:
    ledger = make()
    (group,) = lease(ledger, 1)
    for now in range(0, 3601, 20):
        ledger.renew("a", [group.key], float(now))
        assert not ledger.tick(float(now), lambda name: True)
    ledger.renew("a", [group.key], 3601.0)
    assert ledger.tick(3601.0, lambda name: True) == [group]


def test_a_question_that_ends_every_lease_is_given_up_with_its_reason() -> None:
    ledger = make(max_attempts=2)
    (group,) = lease(ledger, 1)
    ledger.drop_actor("a", "actor dead")
    assert lease(ledger, 1) == [group]
    ledger.drop_actor("a", "actor dead")
    assert group.state == State.ABANDONED
    assert ledger.counts()["abandoned_reasons"] == {"actor dead": 2}
    assert lease(ledger, 1) != [group]


def test_a_group_named_twice_is_handed_back_once() -> None:
    ledger = make(max_attempts=2)
    (group,) = lease(ledger, 1)
    assert ledger.release("a", [group.key, group.key], "no memory") == 1
    assert group.state == State.PENDING
    assert ledger.counts()["sum_ok"]


def test_leaving_is_not_held_against_a_question_and_an_unanswerable_one_goes_at_once() -> None:
    ledger = make(max_attempts=1)
    (group,) = lease(ledger, 1)
    ledger.release("a", [group.key], "SIGTERM", "leaving")
    assert lease(ledger, 1) == [group]
    ledger.release("a", [group.key], "the prompt is too long", "unanswerable")
    assert group.state == State.ABANDONED


# --- steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["count", "refill", "train"])
def test_groups_without_variance(mode: str) -> None:
    """`count`: they hold a place in their step; `refill`: others take it; `train`: they are sent."""
    ledger = make(groups_per_step=2, zero_variance=mode)
    groups = lease(ledger, 4)
    outcomes = [publish(ledger, group, zero_variance=True) for group in groups[:1]]
    outcomes += [publish(ledger, group) for group in groups[1:]]
    assert outcomes[0] == ("accepted" if mode == "train" else "filtered")
    taken = ledger.take(0)
    assert (groups[0] in taken) == (mode != "refill")
    ledger.commit(0, 1)
    assert ledger.counts()["filtered"] == (mode != "train")
    assert ledger.counts()["sum_ok"]


def test_steps_come_in_order_and_one_ahead_at_most() -> None:
    ledger = make(max_staleness=3)
    for group in lease(ledger, 4):
        publish(ledger, group)
    with pytest.raises(LedgerError, match="before step 0 was taken"):
        ledger.take(1)
    ledger.take(0)
    ledger.take(1)
    with pytest.raises(LedgerError) as early:
        ledger.take(2)
    assert early.value.code == "not_now"
    with pytest.raises(LedgerError, match="step 0 must be committed before step 1"):
        ledger.commit(1, 2)
    ledger.commit(0, 1)
    assert ledger.commit(0, 1) == []
    with pytest.raises(LedgerError, match="makes version 2, not 7"):
        ledger.commit(1, 7)
    with pytest.raises(LedgerError) as late:
        ledger.take(0)
    assert late.value.code == "stale"


def test_the_run_ends_with_the_last_full_step() -> None:
    """7 questions, 2 per step: three steps; the odd one is never leased, the normaliser never changes."""
    ledger = make(questions=7, max_epochs=1, groups_per_step=2)
    for _ in range(3):
        for group in lease(ledger, 10):
            publish(ledger, group)
        train(ledger)
    assert ledger.finished
    assert lease(ledger, 10) == []
    assert ledger.counts()["leased"] == 6
    assert ledger.counts()["questions"]["remaining"] == 1


# --- rewinds -----------------------------------------------------------------------------------------------


def committed(steps: int, **changes: object) -> Ledger:
    ledger = make(**changes)
    for _ in range(steps):
        for group in lease(ledger, 5):
            publish(ledger, group)
        train(ledger)
    return ledger


def test_a_rewind_reopens_what_was_kept_and_drops_versions_that_are_gone() -> None:
    ledger = committed(3)
    on_two = [group for group in ledger.groups.values() if group.step == 2]
    buffered = [group for group in ledger.groups.values() if group.state == State.BUFFERED]
    assert [group.newest for group in buffered] == [2]
    outcome = ledger.rewind(1, 1, lambda key: True)
    assert outcome.reopened == 2
    assert buffered[0].state == State.PENDING, "sampled by version 2, which no longer exists"
    assert on_two[0].state == State.BUFFERED, "sampled by version 1, which lives on"
    assert ledger.era == 1
    assert ledger.counts()["sum_ok"]


def test_without_payloads_the_questions_are_asked_again() -> None:
    ledger = committed(3)
    ledger.rewind(1, 1, lambda key: False)
    assert {group.step for group in ledger.groups.values() if group.state == State.CONSUMED} == {0}
    assert ledger.states[State.BUFFERED] == 0
    assert ledger.counts()["abandoned_reasons"]["rewound"] == 3


def test_policies_of_lost_futures_do_not_exist() -> None:
    ledger = committed(3)
    ledger.rewind(1, 1, lambda key: True)
    assert ledger.exists(0, 1)
    assert not ledger.exists(0, 2)
    train(ledger)
    assert ledger.exists(1, 2)
    assert not ledger.exists(0, 2), "version 2 of the era that was rewound is another policy"
    assert not ledger.exists(2, 0)


def test_a_lease_from_before_the_rewind_counts_if_its_versions_live_on() -> None:
    ledger = make(max_staleness=2)
    old, other = lease(ledger, 2)
    publish(ledger, lease(ledger, 1)[0])
    train(ledger)
    ledger.rewind(0, 0, lambda key: True)
    assert publish(ledger, old) == "accepted"
    assert publish(ledger, other, newest=1) == "expired", "its last tokens are of a version that is gone"


def test_the_same_rewind_twice_opens_one_era_and_a_checkpoint_from_the_future_is_refused() -> None:
    ledger = committed(2)
    ledger.rewind(1, 1, lambda key: True)
    assert ledger.era == 1
    ledger.rewind(1, 1, lambda key: True)
    assert ledger.era == 1
    with pytest.raises(LedgerError, match="ahead of this broker's ledger"):
        ledger.rewind(9, 9, lambda key: True)
