"""What an engine expects to be sent is what a snapshot of the same model holds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from actors.weights.adapters import neutral_layer
from actors.weights.expected import expected_manifest
from common.weights import Snapshot


def config(*, tied: bool, layers: int = 2) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_snapshot_in_the_engines_dtype_fits(tied, dtype):
    shape = config(tied=tied)
    engine = SimpleNamespace(hf_config=shape, trust_remote_code=False, dtype=dtype)
    expected = expected_manifest(engine)
    pushed = Snapshot.from_tensors(Qwen2ForCausalLM(shape).named_parameters(), dtype=dtype).manifest
    assert pushed.difference(expected) is None
    assert expected.nbytes == pushed.nbytes


def test_a_deeper_model_is_refused_by_the_name_of_its_first_extra_parameter():
    shape, deeper = config(tied=True), config(tied=True, layers=3)
    engine = SimpleNamespace(hf_config=shape, trust_remote_code=False, dtype=torch.float32)
    pushed = Snapshot.from_tensors(Qwen2ForCausalLM(deeper).named_parameters()).manifest
    assert pushed.difference(expected_manifest(engine)) == (
        "parameter model.layers.2.self_attn.q_proj.weight of the push is unknown to the engine's model"
    )


def test_a_neutral_adapter_names_a_projection_of_the_model():
    engine = SimpleNamespace(hf_config=config(tied=True), trust_remote_code=False, dtype=torch.float32)
    layer = neutral_layer(expected_manifest(engine))
    assert (layer.name, layer.shape) == ("model.layers.0.self_attn.q_proj.weight", (16, 16))
