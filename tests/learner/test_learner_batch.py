"""The plan of a step: a permutation over the scheduled responses, the same on every rank."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from learner.batch import Responses, Texts, groups_of_rank, plan_updates
from learner.metrics import batch_metrics
from learner.mismatch import Mismatch
from learner.objective import objective_of
from learner.prepare import Preparation
from tests.learner.tiny import VOCABULARY, made_up_batch, tiny_recipe
from tests.learner.update_worker import SHAPE


def recipe_for(groups: int, updates: int = 1, epochs: int = 1, **sections):
    return tiny_recipe(
        batch={"questions_per_step": groups, "optimizer_steps": updates, **sections.pop("batch", {})},
        algorithm={"epochs": epochs},
        **sections,
    )


@settings(deadline=None, max_examples=40)
@given(
    groups=st.integers(1, 6),
    filtered=st.integers(0, 4),
    updates=st.sampled_from([1, 2, 4]),
    epochs=st.integers(1, 2),
    ranks=st.integers(1, 3),
    seed=st.integers(0, 2**20),
)
def test_every_response_is_in_one_update_of_each_epoch(groups, filtered, updates, epochs, ranks, seed):
    recipe = recipe_for(groups + filtered, updates, epochs)
    batch, _ = made_up_batch([[1, 0, 0, 1]] * groups, seed=seed)
    responses = Responses.of(batch, 4)
    scheduled = 4 * (groups + filtered)
    plans = plan_updates(responses, scheduled, recipe, ranks)
    assert len(plans) == updates * epochs
    for epoch in range(epochs):
        part = plans[epoch * updates : (epoch + 1) * updates]
        trained = [sample for plan in part for rank in plan.rows for row in rank for sample in row]
        assert sorted(trained) == list(range(4 * groups))
        # N is what was scheduled, not what was sent.
        assert sum(plan.size.responses for plan in part) == scheduled
    for plan in plans:
        assert len({len(rows) for rows in plan.rows}) == 1, "ranks must run equally many micro-batches"
        assert all(rows for rows in plan.rows)


def test_filtered_groups_do_not_move_the_others():
    """A response stays in its update whether or not groups of equal rewards, later in the order, were sent."""
    recipe = recipe_for(6, updates=4)
    batch, _ = made_up_batch([[1, 0, 0, 1]] * 6)
    whole = plan_updates(Responses.of(batch, 4), 24, recipe, 1)
    fewer = structs.replace(batch, groups=batch.groups[:4])
    part = plan_updates(Responses.of(fewer, 4), 24, recipe, 1)
    for before, after in zip(whole, part, strict=True):
        kept = {sample for row in before.rows[0] for sample in row if sample < 16}
        assert kept == {sample for row in after.rows[0] for sample in row}


def test_the_order_depends_on_seed_and_step_and_on_nothing_else():
    batch, _ = made_up_batch([[1, 0, 0, 1]] * 4)
    responses = Responses.of(batch, 4)
    recipe = recipe_for(4, updates=2)
    again = plan_updates(responses, 16, recipe, 1)
    assert plan_updates(responses, 16, recipe, 1) == again
    later = plan_updates(replace(responses, step=1), 16, recipe, 1)
    assert [plan.rows for plan in later] != [plan.rows for plan in again]


def test_a_rank_fetches_its_own_groups_and_all_are_fetched_by_somebody():
    recipe = recipe_for(6)
    batch, _ = made_up_batch([[1, 0, 0, 1]] * 6)
    responses = Responses.of(batch, 4)
    plans = plan_updates(responses, 24, recipe, 2)
    mine = [set(groups_of_rank(plans, responses, rank)) for rank in (0, 1)]
    assert mine[0] | mine[1] == {header.group for header in batch.groups}


def test_an_incomplete_group_is_refused():
    batch, _ = made_up_batch([[1, 0, 0]])
    with pytest.raises(ValueError, match="3 of 4 responses"):
        Responses.of(batch, 4)


@pytest.mark.parametrize("defect", ["id too large", "negative id", "nan", "prompt"])
def test_a_broken_response_is_left_out_and_keeps_its_place(defect):
    recipe = recipe_for(2)
    batch, payloads = made_up_batch([[1, 0, 0, 1], [0, 0, 1, 1]])
    group = batch.groups[0].group
    prompt, ids, logprobs = (
        np.frombuffer(part, kind).copy()
        for part, kind in zip(payloads[group], ("<i4", "<i4", "<f4"), strict=True)
    )
    if defect == "id too large":
        ids[0] = VOCABULARY
    elif defect == "negative id":
        ids[0] = -1
    elif defect == "nan":
        logprobs[0] = np.nan
    else:
        prompt[0] = VOCABULARY
    payloads[group] = [prompt.tobytes(), ids.tobytes(), logprobs.tobytes()]
    broken = {0, 1, 2, 3} if defect == "prompt" else {0}
    assert Texts(batch.groups, payloads, VOCABULARY).invalid == broken
    work = Preparation(recipe, objective_of(recipe), SHAPE, 0, 1, None)
    work.wanted(batch)
    (rows,) = work.prepare(batch, payloads).updates
    for row in rows:
        masked = ~row.tokens.mask
        left_out = {row.batch.samples[number] for number in row.tokens.sequence[masked].tolist()}
        assert left_out == broken & set(row.batch.samples)
        assert float(row.tokens.weights[0]) == pytest.approx(1 / (8 * 32))
        assert torch.isfinite(row.tokens.behaviour_logp).all()
        assert row.current.tolist() == row.tokens.mask.tolist(), "nor does it say anything about the engine"


def test_rewards_count_filtered_groups_and_staleness_counts_tokens():
    batch, _ = made_up_batch([[1, 0, 0, 1]], step=5, version=3)
    batch = structs.replace(batch, scheduled=3, filtered=2, filtered_rewards=[1.0, 1.0])
    metrics = batch_metrics(batch, Responses.of(batch, 4), 12)
    assert metrics["reward"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert metrics["filtered_share"] == pytest.approx(2 / 3)
    assert metrics["staleness_mean"] == metrics["staleness_max"] == 2
    assert metrics["by_staleness/token_share_at_2"] == 1
    assert metrics["verdict_correct"] == 0.5


def test_mismatch_looks_at_tokens_of_the_current_version_only():
    mismatch = Mismatch.zero()
    logp, behaviour = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -2.0, -9.0])
    mismatch.add(logp, behaviour, torch.tensor([True, True, False]))
    mismatch.add(torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.bool))
    summary = mismatch.summary()
    assert summary["mismatch_tokens"] == 2
    assert summary["mismatch_mean"] == pytest.approx(0.25)
    assert summary["mismatch_max"] == pytest.approx(0.5)
    assert summary["mismatch_k3"] == pytest.approx((np.exp(0.5) - 1.5) / 2)
    assert Mismatch.zero().summary() == {}
