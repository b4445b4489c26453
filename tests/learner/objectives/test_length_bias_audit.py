"""The audit's verdicts: the five frameworks of the paper's Table 2 are biased, a constant is not."""

from __future__ import annotations

import pytest

from learner.objectives.audit import LENGTHS, length_bias_audit

ROWS = {row.name.split()[0] + (" null" if "null" in row.name else ""): row for row in length_bias_audit()[:5]}
ALL = {row.name: row for row in length_bias_audit()}


@pytest.mark.parametrize("name", ["trl", "OpenRLHF", "verl", "SimpleRL-Zero", "Open-Reasoner-Zero"])
def test_every_framework_of_table_2_is_biased(name):
    assert "own length" in ROWS[name].biases


@pytest.mark.parametrize(
    "name",
    ["slipstream constant", "trl, loss_type dr_grpo", "oat 0.0.9 (masked_sum, constant 1)"],
)
def test_a_constant_is_unbiased(name):
    assert ALL[name].unbiased
    assert len(set(ALL[name].gradients)) == 1


def test_mean_over_the_response_divides_the_gradient_by_its_length():
    row = ALL["slipstream response_mean"]
    assert row.own_length == pytest.approx(-1)
    assert row.gradients[0] / row.gradients[-1] == pytest.approx(LENGTHS[-1] / LENGTHS[0], rel=1e-5)
    assert row.biases == ("own length",)


def test_mean_over_tokens_also_depends_on_the_others_but_ours_not_on_the_split():
    assert ALL["slipstream token_mean"].biases == ("own length", "other lengths")
    assert ROWS["trl"].biases == ("own length", "other lengths", "micro-batches")


def test_padded_width_is_no_constant():
    (row,) = (row for name, row in ALL.items() if "null" in name)
    assert row.biases == ("own length", "other lengths", "micro-batches")
