"""What is exported loads anywhere: adapters merged, ties kept, nothing of our own in it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from learner.export import export_model
from learner.logprobs import PolicyModel
from learner.model import with_adapters
from learner.snapshot import take_snapshot
from tests.learner.tiny import save_tiny_model, tiny_lm, tiny_recipe

TOKENS = torch.arange(2, 20)[None]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("adapters", [True, False])
def test_an_export_gives_the_logits_of_the_policy(tmp_path, tied, adapters):
    lm = tiny_lm(tied=tied)
    if adapters:
        lm = with_adapters(lm, tiny_recipe(lora={"rank": 4}))
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    expected = lm(TOKENS).logits.detach()
    policy = PolicyModel(lm, value_head=True)
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_model(tmp_path / "base"))
    export_model(SimpleNamespace(policy=policy), take_snapshot(policy), tokenizer, tmp_path / "hf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(loaded(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    assert {name for name, _ in loaded.named_parameters()} == {
        name for name, _ in tiny_lm(tied=tied).named_parameters()
    }
    assert (loaded(TOKENS).logits - tiny_lm(tied=tied)(TOKENS).logits).abs().max() > 1e-3 or not adapters


def test_other_ranks_write_nothing(tmp_path):
    export_model(SimpleNamespace(policy=None), None, None, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
