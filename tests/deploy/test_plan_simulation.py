"""The simulation loses nothing, obeys the staleness bound, and agrees with arithmetic where arithmetic is possible."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.recipe import Recipe
from deploy.planning.rates import Rates, sequence_seconds
from deploy.planning.simulate import Outcome, simulate
from deploy.planning.workload import LogNormal, Recorded, Workload

RATES = Rates(decode_s=0.004, sequence_s=0.0005, train_token_s=1e-4, train_fixed_s=0.02, push_s=0.05)
STEPS = 12


def recipe(
    questions: int = 8, group: int = 4, staleness: int = 2, slots: int = 16, actors: int = 1, **more: Any
) -> Recipe:
    sections = {
        "run": {"name": "plan", "steps": STEPS},
        "model": {"path": "nowhere", "dtype": "float32"},
        "data": {"train": "nothing"},
        "rollout": {"group_size": group, "max_tokens": 64},
        "batch": {
            "questions_per_step": questions,
            "optimizer_steps": 1,
            "max_staleness": staleness,
            "zero_variance": more.get("zero_variance", "count"),
        },
        "actor": {"max_sequences": slots, "count": actors},
        "broker": {"heartbeat_s": 0.001, "dead_after_s": 1.0},
        "eval": {"every": 3},
        "learner": {"checkpoint_every": 5},
    }
    return Recipe.model_validate(sections)


def constant(length: int, **more: Any) -> Workload:
    return Workload(Recorded([(length,)], 64), prompt_tokens=10, **more)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Recipe, Rates, Workload, int]:
    setting = recipe(
        questions=draw(st.integers(1, 6)),
        group=draw(st.integers(2, 4)),
        staleness=draw(st.integers(0, 3)),
        slots=draw(st.integers(1, 12)),
        actors=draw(st.integers(1, 4)),
        zero_variance=draw(st.sampled_from(["count", "train", "refill"])),
    )
    seconds = st.floats(0, 0.3)
    rates = Rates(
        decode_s=draw(st.floats(1e-12, 0.1)),
        sequence_s=draw(st.floats(0, 0.01)),
        train_token_s=draw(st.floats(1e-6, 0.01)),
        train_fixed_s=draw(seconds),
        prompt_s=draw(st.floats(0, 0.001)),
        hand_over_s=draw(seconds),
        publish_s=draw(seconds),
        push_s=draw(seconds),
        stop_s=draw(seconds),
        checkpoint_s=draw(seconds),
        train_contention=draw(st.sampled_from([1.0, 1.5, 3.0])),
        decode_contention=draw(st.sampled_from([1.0, 1.5, 3.0])),
    )
    workload = Workload(
        LogNormal(draw(st.floats(2, 40)), 64, draw(st.floats(0, 1))),
        prompt_tokens=draw(st.floats(1, 50)),
        filtered_share=draw(st.floats(0, 0.6)),
        eval_sequences=draw(st.integers(0, 6)),
        questions=1000,
    )
    return setting, rates, workload, draw(st.integers(0, 5))


@settings(max_examples=80)
@given(cases())
def test_nothing_is_lost_and_nothing_is_too_old(case: tuple[Recipe, Rates, Workload, int]) -> None:
    setting, rates, workload, seed = case
    outcome = simulate(setting, rates, workload, seed=seed)
    ledger, batch = outcome.ledger, setting.batch
    assert ledger["sum_ok"]
    assert ledger["expired"] == 0, "admission leaves nothing to expire while actors live"
    assert len(outcome.steps) == STEPS
    counted = ledger["filtered"] if batch.zero_variance == "count" else 0
    assert ledger["consumed"] + counted >= STEPS * batch.questions_per_step
    assert all(0 <= lag <= batch.max_staleness for lag in outcome.staleness)
    assert not outcome.staleness or sum(outcome.staleness.values()) == pytest.approx(1)
    assert 0 <= outcome.learner_idle <= 1
    assert 0 <= outcome.actor_idle <= 1
    times = [piece.committed for piece in outcome.steps]
    assert times == sorted(times)


@settings(max_examples=20)
@given(cases())
def test_same_seed_same_run(case: tuple[Recipe, Rates, Workload, int]) -> None:
    setting, rates, workload, seed = case
    assert simulate(setting, rates, workload, seed=seed) == simulate(setting, rates, workload, seed=seed)


@settings(max_examples=25)
@given(
    st.integers(1, 6),
    st.integers(5, 60),
    st.floats(1e-4, 1e-2),
    st.floats(0, 1e-3),
    st.sampled_from([LogNormal, None]),
)
def test_actors_never_slow_an_actor_bound_run(
    actors: int, length: int, decode_s: float, sequence_s: float, kind: type | None
) -> None:
    rates = Rates(decode_s=decode_s, sequence_s=sequence_s, train_token_s=1e-9)
    setting = recipe(questions=24, group=2, staleness=4, slots=2)
    workload = constant(length) if kind is None else Workload(LogNormal(length, 64), prompt_tokens=10)
    few, more = (simulate(setting, rates, workload, actors=count) for count in (actors, actors + 1))
    assert more.step_s <= few.step_s * 1.02


def test_actor_bound_run_takes_the_time_of_its_tokens() -> None:
    rates = replace(RATES, train_token_s=1e-9, train_fixed_s=0.0, push_s=0.0)
    outcome = simulate(recipe(staleness=4), rates, constant(20))
    rounds = 8 * 4 / 16  # responses of a step through the slots of the engine
    assert outcome.step_s == pytest.approx(rounds * 20 * rates.step_s(16), rel=0.02)
    assert outcome.actor_idle < 0.01
    assert outcome.tokens_s == pytest.approx(rates.actor_rate(16), rel=0.02)


def test_learner_bound_run_takes_the_time_of_its_learner() -> None:
    rates = replace(RATES, decode_s=1e-6, sequence_s=0.0, publish_s=0.03, checkpoint_s=0.0)
    outcome = simulate(recipe(staleness=2), rates, constant(20))
    assert outcome.step_s == pytest.approx(0.02 + 8 * 4 * (20 + 10) * 1e-4 + 0.03, rel=1e-3)
    assert outcome.learner_idle == pytest.approx(0, abs=1e-3)
    assert outcome.actor_idle > 0.9


@pytest.mark.parametrize("group", [2, 4])
def test_synchronous_run_takes_the_sum_of_both(group: int) -> None:
    rates = replace(RATES, publish_s=0.03, hand_over_s=0.01)
    outcome = simulate(recipe(group=group, staleness=0, slots=64), rates, constant(20))
    running = 8 * group
    generate = 20 * rates.step_s(running) + rates.hand_over_s
    train = rates.train_fixed_s + running * (20 + 10) * rates.train_token_s + rates.publish_s
    assert outcome.step_s == pytest.approx(generate + train + rates.push_s, abs=0.003)
    assert outcome.staleness == {0: 1.0}
    assert outcome.learner_idle == pytest.approx((generate + rates.push_s) / outcome.step_s, abs=0.01)


def test_an_actor_says_its_new_version_at_once() -> None:
    rare = recipe(staleness=0, slots=64)
    broker = rare.broker.model_copy(update={"heartbeat_s": 1.0, "dead_after_s": 5.0})
    slow = simulate(rare.model_copy(update={"broker": broker}), RATES, constant(20))
    assert slow.step_s == simulate(rare, RATES, constant(20)).step_s


@pytest.mark.parametrize("train", [1.0, 2.0])
@pytest.mark.parametrize("decode", [1.0, 2.0])
def test_on_one_machine_they_slow_each_other_down(train: float, decode: float) -> None:
    shared = replace(RATES, train_contention=train, decode_contention=decode)
    assert _step(shared, staleness=0) == pytest.approx(_step(RATES, staleness=0), rel=1e-6), "never at once"
    apart, together = (simulate(recipe(staleness=2), rates, constant(20)) for rates in (RATES, shared))
    assert together.training_s == pytest.approx(train * apart.training_s, rel=0.1)
    assert (together.group_s > 1.05 * apart.group_s) == (decode > 1)
    assert 0.95 * apart.step_s <= together.step_s <= 2 * apart.step_s


def test_filtered_groups_cost_the_learner_nothing() -> None:
    rates = replace(RATES, decode_s=1e-6, sequence_s=0.0, train_fixed_s=0.0)
    whole, half = (simulate(recipe(), rates, constant(20, filtered_share=share)) for share in (0.0, 0.5))
    assert half.step_s == pytest.approx(whole.step_s / 2, rel=0.25)


def test_prefixes_are_computed_again_after_a_push() -> None:
    rates = replace(RATES, prompt_s=1e-3)
    assert _step(rates, staleness=2) > _step(replace(rates, prompt_s=0.0), staleness=2)


def _step(rates: Rates, staleness: int) -> float:
    return simulate(recipe(staleness=staleness), rates, constant(20)).step_s


def test_an_evaluation_pins_the_weights_of_its_actor() -> None:
    busy: Outcome = simulate(recipe(), RATES, constant(20, eval_sequences=200))
    free = simulate(recipe(), RATES, constant(20))
    assert busy.step_s > free.step_s
    assert busy.staleness_mean >= free.staleness_mean


def test_a_rate_that_the_decode_step_forbids() -> None:
    assert sequence_seconds(1000, 10, 0.004) == pytest.approx(0.0006)
    with pytest.raises(ValueError, match="less than"):
        sequence_seconds(10_000, 10, 0.004)


@given(st.integers(0, 1000), st.floats(1, 100), st.integers(1, 200), st.integers(1, 20))
def test_lengths_are_within_the_budget(seed: int, mean: float, longest: int, size: int) -> None:
    import numpy as np

    for lengths in (LogNormal(mean, longest), Recorded([(3, 500), (7,)], longest)):
        drawn = lengths.draw(np.random.default_rng(seed), size)
        assert len(drawn) == size
        assert all(1 <= length <= longest for length in drawn)
