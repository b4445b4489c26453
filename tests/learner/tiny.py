"""A tiny model in a folder, and a recipe that trains it, for tests of the learner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from common.messages import Batch, GroupHeader, GroupId, ResponseHeader
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


def tiny_recipe(path: Path | str = "absent", **sections: dict[str, Any]) -> Recipe:
    """A recipe in float32 for the tiny model; sections are merged in."""
    tree: dict[str, dict[str, Any]] = {
        "model": {"path": str(path), "max_context": 512, "dtype": "float32"},
        "data": {"train": "unused"},
        "rollout": {"group_size": 4, "max_tokens": 32},
        "batch": {"questions_per_step": 4, "optimizer_steps": 1},
        "learner": {"lr": 1e-3, "zero_stage": 0, "micro_batch_tokens": 256},
    }
    for name, values in sections.items():
        tree.setdefault(name, {}).update(values)
    return Recipe.model_validate(tree)


def made_up_batch(
    rewards: list[list[float]],
    *,
    step: int = 0,
    version: int | None = None,
    seed: int = 0,
    longest: int = 24,
    truncated: tuple[int, ...] = (),
) -> tuple[Batch, dict[GroupId, list[bytes]]]:
    """A batch with one group per row of `rewards`, and its payloads.

    Prompts have 3 to 8 tokens, responses 1 to `longest`; behaviour log-probabilities are those of no policy in
    particular. Responses whose number is in `truncated` have hit the budget.
    """
    rng = np.random.default_rng(seed)
    headers, payloads = [], {}
    for index, row in enumerate(rewards):
        group = GroupId(0, index)
        prompt = rng.integers(2, VOCABULARY, rng.integers(3, 9), dtype=np.int32)
        lengths = rng.integers(1, longest, len(row), endpoint=True)
        ids = rng.integers(2, VOCABULARY, lengths.sum(), dtype=np.int32)
        logprobs = -4.0 + rng.standard_normal(len(ids)).astype(np.float32)
        responses = [
            ResponseHeader(
                tokens=int(tokens),
                reward=float(reward),
                verdict="correct" if reward > 0 else "wrong",
                finish="length" if index * len(row) + number in truncated else "stop",
                versions=[(step if version is None else version, int(tokens))],
            )
            for number, (tokens, reward) in enumerate(zip(lengths, row, strict=True))
        ]
        headers.append(
            GroupHeader(
                group=group, lease=1, era=1, actor="a", prompt_tokens=len(prompt), responses=responses
            )
        )
        payloads[group] = [prompt.tobytes(), ids.tobytes(), logprobs.tobytes()]
    return Batch(step=step, ready=True, groups=headers, scheduled=len(rewards)), payloads
