"""The engine in this process: what an update asks of the device, and that the probe is what a plain model says."""

from __future__ import annotations

import pytest
import torch

from common.weights.probe import PROBE_TOKENS
from learner.engine import Engine
from learner.model import PolicyModel
from learner.packing import pack
from learner.probe import take_probe
from learner.ranks import leave_ranks, start_ranks
from tests.learner.tiny import tiny_lm, tiny_recipe


@pytest.fixture(scope="module")
def ranks():
    """DeepSpeed can join a group once in the life of a process: no other module here may do so."""
    made = start_ranks(60.0, 0)
    yield made
    leave_ranks(made)


@pytest.fixture(scope="module")
def engine(ranks):
    made = Engine(PolicyModel(tiny_lm()), tiny_recipe(rollout={"temperature": 0.5}), ranks, 1)
    yield made
    made.close()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_an_update_never_waits_for_the_whole_device(ranks, stage, monkeypatch):
    """On a GPU it would wait for the kernel of a dead weight link, too. Four steps: DeepSpeed's timer starts at the third."""
    from deepspeed.accelerator import get_accelerator

    made = Engine(PolicyModel(tiny_lm()), tiny_recipe(learner={"zero_stage": stage}), ranks, 4)
    row = pack([0, 1], [torch.tensor([2, 3]), torch.tensor([3])], [torch.tensor([4, 5]), torch.tensor([6])])
    waits = []
    monkeypatch.setattr(get_accelerator(), "synchronize", lambda *_: waits.append(1))
    try:
        for _ in range(4):
            made.update([row, row], lambda _, outputs: outputs[0].sum())
        assert not waits
    finally:
        made.close()


@pytest.mark.parametrize("length", [2, 40, PROBE_TOKENS + 50])
def test_it_scores_the_first_sequence_of_a_row_at_temperature_1(engine, length):
    tokens = torch.randint(0, 64, (length,), generator=torch.Generator().manual_seed(length))
    row = pack([0, 1], [tokens[:1], [3]], [tokens[1:], [4, 5]])
    probe = take_probe(engine, row)
    kept = tokens[:PROBE_TOKENS]
    assert probe.tokens == tuple(kept.tolist())
    with torch.no_grad():
        plain = tiny_lm()(kept[None]).logits[0, :-1].log_softmax(-1)
    expected = plain.gather(1, kept[1:, None]).flatten()
    torch.testing.assert_close(torch.tensor(probe.logprobs), expected, atol=1e-5, rtol=1e-5)


def test_a_rank_without_a_sequence_has_none(engine):
    assert take_probe(engine, pack([], [], [])) is None
