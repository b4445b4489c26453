"""Corrections for staleness: bounds kept, whole responses kept or dropped, M2PO drops no more than needed."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.objectives.corrections import (
    geometric_mask,
    icepop,
    m2po,
    second_moment_limit,
    sequence_mask,
    tis,
)

LOG_RHO = st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=12)


@given(LOG_RHO)
def test_tis_truncates_and_icepop_drops(values):
    log_rho = torch.tensor(values)
    for value, truncated, popped in zip(values, tis(log_rho, 0, 2), icepop(log_rho, 0.5, 5), strict=True):
        rho = math.exp(value)
        assert float(truncated) == pytest.approx(min(rho, 2.0), rel=1e-5)
        if abs(rho - 0.5) > 1e-5 and abs(rho - 5) > 1e-5:
            assert float(popped) == pytest.approx(rho if 0.5 <= rho <= 5 else 0.0, rel=1e-5)


SEQUENCE = torch.tensor([0, 0, 0, 1, 1, 2])


def test_sequence_mask_weighs_by_the_product_and_drops_whole_responses():
    log_rho = torch.tensor([0.2, 0.3, -0.1, 0.6, 0.6, -3.0])
    weights = sequence_mask(log_rho, 0.0, 2.0, SEQUENCE, 3)
    torch.testing.assert_close(weights, torch.tensor([0.4, 0.4, 0.4, -math.inf, -math.inf, -3.0]).exp())


def test_sequence_mask_falls_with_length_and_geometric_mask_does_not():
    for length, kept in ((5, True), (50, False)):
        log_rho, sequence = torch.full((length,), 0.1), torch.zeros(length, dtype=torch.int64)
        assert bool(sequence_mask(log_rho, 0.0, 2.0, sequence, 1).all()) == kept
        assert geometric_mask(log_rho, 0.5, 2.0, sequence, 1).all()


def test_geometric_mask_keeps_by_the_mean_and_weighs_by_the_token():
    log_rho = torch.tensor([1.5, -0.5, -0.7, 0.8, 0.8, 0.1])
    weights = geometric_mask(log_rho, 0.5, 2.0, SEQUENCE, 3)
    torch.testing.assert_close(weights[:3], torch.tensor([2.0, math.exp(-0.5), math.exp(-0.7)]))
    assert weights[3:5].tolist() == [0, 0]  # mean 0.8 > log 2
    assert float(weights[5]) == pytest.approx(math.exp(0.1))


@given(LOG_RHO, st.floats(0.001, 3))
def test_m2po_meets_the_constraint_and_drops_as_few_tokens_as_possible(values, tau):
    log_rho = torch.tensor(values)
    kept = m2po(log_rho, second_moment_limit(log_rho, tau)) > 0
    moments = log_rho.double().square()
    if kept.any():
        assert float(moments[kept].mean()) <= tau * (1 + 1e-9)
    # Best by brute force over all subsets, but tokens of equal moment stay together.
    best = max(
        (
            len(subset)
            for size in range(len(values) + 1)
            for subset in [moments.sort().values[:size]]
            if size == 0 or float(subset.mean()) <= tau
        ),
        default=0,
    )
    first_dropped = moments.sort().values[best:]
    ties = int((moments.sort().values[:best] == first_dropped[0]).sum()) if len(first_dropped) else 0
    assert int(kept.sum()) == best - ties


def test_m2po_drops_the_largest_first():
    log_rho = torch.tensor([0.1, -0.9, 0.2, 0.3])
    limit = second_moment_limit(log_rho, 0.05)
    assert limit == pytest.approx(0.3)
    assert (m2po(log_rho, limit) == 0).tolist() == [False, True, False, False]


def test_m2po_edges():
    assert second_moment_limit(torch.empty(0), 0.04) == math.inf
    assert second_moment_limit(torch.zeros(5), 0.04) == math.inf
    assert not m2po(torch.full((3,), 1.0), second_moment_limit(torch.full((3,), 1.0), 0.04)).any()


@given(LOG_RHO, st.integers(1, 4))
def test_m2po_limit_does_not_depend_on_the_order_of_tokens(values, rotation):
    log_rho = torch.tensor(values)
    assert second_moment_limit(log_rho.roll(rotation), 0.04) == second_moment_limit(log_rho, 0.04)


def test_no_subset_beats_the_smallest_moments():
    """The brute force above looks at sorted prefixes only; this is why that is enough."""
    moments = [0.01, 0.04, 0.09, 0.5, 0.9]
    for size in range(1, 6):
        smallest = min(sum(subset) for subset in itertools.combinations(moments, size))
        assert smallest == pytest.approx(sum(sorted(moments)[:size]))
