"""Packing: every token once, budgets kept, equal counts over ranks, and rows that say where everything lies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.packing import cost, optimizer_steps, pack, plan_micro_batches

LENGTHS = st.lists(st.integers(1, 60), max_size=40)


@given(LENGTHS, st.integers(1, 4), st.integers(1, 100), st.sampled_from([None, 20]))
def test_plan_covers_every_sample_once_within_budget(lengths, ranks, budget, crossover):
    plan = plan_micro_batches(lengths, ranks=ranks, token_budget=budget, crossover=crossover)
    rows = [row for rank in plan for row in rank]
    assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
    assert len(plan) == ranks
    assert len({len(rank) for rank in plan}) == 1
    for row in rows:
        assert len(row) <= 1 or sum(lengths[sample] for sample in row) <= budget


@given(LENGTHS, st.integers(1, 4), st.integers(1, 100))
def test_plan_is_a_pure_function_and_needs_few_rows(lengths, ranks, budget):
    plan = plan_micro_batches(lengths, ranks=ranks, token_budget=budget)
    assert plan == plan_micro_batches(list(lengths), ranks=ranks, token_budget=budget)
    # Two first-fit rows never fit in one, so their tokens are more than half the budget each, but for one row.
    used = sum(min(length, budget) for length in lengths)
    rows = sum(len(rank) for rank in plan)
    assert rows <= 2 * used / budget + 1 + ranks


def test_plan_leaves_no_rank_idle_while_there_are_samples():
    plan = plan_micro_batches([10] * 8, ranks=4, token_budget=1000)
    assert [sum(map(len, rank)) for rank in plan] == [2, 2, 2, 2]


def test_plan_balances_attention_work_and_not_only_tokens():
    lengths = [100] + [10] * 30  # one long sample costs 100² / 10 = 1000 more
    plan = plan_micro_batches(lengths, ranks=2, token_budget=10_000, crossover=10)
    work = sorted(sum(cost(lengths[s], 10) for row in rank for s in row) for rank in plan)
    assert work[1] == cost(100, 10)
    assert sorted(len(rank[0]) for rank in plan) == [1, 30]


def test_plan_of_some_samples_of_a_batch():
    plan = plan_micro_batches([5, 6, 7, 8], ranks=1, token_budget=20, samples=[1, 3])
    assert plan == [[[3, 1]]]
    assert plan_micro_batches([5, 6], ranks=2, token_budget=20, samples=[]) == [[], []]


@given(st.integers(0, 50), st.integers(1, 9), st.integers(0, 3))
def test_optimizer_steps_partition_evenly_and_depend_on_the_seed_only(samples, steps, seed):
    parts = optimizer_steps(samples, steps, seed)
    assert sorted(sample for part in parts for sample in part) == list(range(samples))
    assert len(parts) == steps
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert parts == optimizer_steps(samples, steps, seed)


def test_optimizer_steps_shuffle_differently_under_another_seed():
    assert optimizer_steps(64, 1, 0) != optimizer_steps(64, 1, 1)


IDS = st.lists(st.integers(0, 99), min_size=1, max_size=7)


@given(st.lists(st.tuples(IDS, IDS), min_size=1, max_size=6), st.randoms())
def test_row_holds_each_sample_whole(pairs, random):
    prompts, responses = [p for p, _ in pairs], [r for _, r in pairs]
    samples = random.sample(range(len(pairs)), random.randint(1, len(pairs)))
    batch = pack(samples, prompts, responses)
    row, positions = batch.input_ids[0].tolist(), batch.position_ids[0].tolist()
    assert row == [token for s in samples for token in prompts[s] + responses[s]]
    assert positions == [i for s in samples for i in range(len(prompts[s] + responses[s]))]
    assert batch.lengths == tuple(len(prompts[s] + responses[s]) for s in samples)
    assert batch.targets.tolist() == [token for s in samples for token in responses[s]]
    assert [row[column + 1] for column in batch.state_index.tolist()] == batch.targets.tolist()
    first = [positions[column] for column in batch.state_index.tolist()]
    assert first == [len(prompts[s]) - 1 + i for s in samples for i in range(len(responses[s]))]
    assert batch.response_lengths.tolist() == [len(responses[s]) for s in samples]
    assert batch.samples == tuple(samples)


def test_values_go_into_the_row_and_back():
    prompts, responses = [[1], [2, 3], [4]], [[5, 6], [7], [8, 9, 10]]
    batch = pack([2, 0], prompts, responses)
    per_token = [[0.1, 0.2], [9.0], [0.3, 0.4, 0.5]]
    packed = batch.concatenate(per_token, torch.float64)
    assert packed.tolist() == [0.3, 0.4, 0.5, 0.1, 0.2]
    assert {k: v.tolist() for k, v in batch.split(packed).items()} == {2: [0.3, 0.4, 0.5], 0: [0.1, 0.2]}
    assert batch.per_token(torch.tensor([10.0, 20.0, 30.0])).tolist() == [30, 30, 30, 10, 10]


def test_values_of_another_length_are_refused_by_sample():
    batch = pack([1], [[1], [2]], [[5], [6, 7]])
    with pytest.raises(ValueError, match="sample 1 has 1 values for 2"):
        batch.concatenate([[0.0], [0.0]], torch.float32)


def test_filler_has_one_token_and_no_response():
    batch = pack([], [], [])
    assert batch.is_filler
    assert batch.input_ids.shape == (1, 1)
    assert batch.targets.shape == batch.state_index.shape == batch.sequence.shape == (0,)
    assert batch.concatenate([], torch.float32).shape == (0,)
    assert batch.per_token(torch.tensor([1.0])).shape == (0,)


@pytest.mark.parametrize(("prompt", "response", "what"), [([], [1], "prompt"), ([1], [], "response")])
def test_empty_parts_are_refused(prompt, response, what):
    with pytest.raises(ValueError, match=f"sample 0 has an empty {what}"):
        pack([0], [prompt], [response])


def test_bad_plan_settings_are_refused():
    with pytest.raises(ValueError, match="token_budget"):
        plan_micro_batches([1], ranks=1, token_budget=0)
