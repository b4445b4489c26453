"""A tiny model in a folder, and a recipe that trains it, for tests of the learner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from common.recipe.schema import Recipe

VOCABULARY = 64


def tiny_lm(seed: int = 0, *, hidden: int = 32, layers: int = 2, tied: bool = True) -> Qwen2ForCausalLM:
    """A random Qwen2 of about 20 thousand weights."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    return Qwen2ForCausalLM(config)


def save_tiny_model(folder: Path, seed: int = 0, **shape: Any) -> Path:
    """Model and tokenizer in Hugging Face format."""
    tiny_lm(seed, **shape).save_pretrained(folder)
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1").save_pretrained(
        folder
    )
    return folder


def tiny_recipe(model: Path | str = "absent", **sections: dict[str, Any]) -> Recipe:
    """A recipe in float32 for the tiny model; sections are merged in."""
    tree: dict[str, dict[str, Any]] = {
        "model": {"path": str(model), "max_context": 512, "dtype": "float32"},
        "data": {"train": "unused"},
        "rollout": {"group_size": 4, "max_tokens": 32},
        "batch": {"questions_per_step": 4, "optimizer_steps": 1},
        "learner": {"lr": 1e-3, "zero_stage": 0, "micro_batch_tokens": 256},
    }
    for name, values in sections.items():
        tree.setdefault(name, {}).update(values)
    return Recipe.model_validate(tree)
