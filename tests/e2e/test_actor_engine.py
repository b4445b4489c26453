"""The engine records what it samples (I6): compared with Hugging Face on a tiny random policy in float32."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from actor_world import EOS, write_policy

from actors.engine import Engine, Sampling, engine_arguments, sampler_seed
from actors.prompts import Prompts
from common.recipe import Recipe
from common.tasks.templates import Template

pytestmark = pytest.mark.e2e

GENERATION = [f"What is {a}*{b}?" for a in range(4) for b in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_policy(tmp_path_factory.mktemp("policy"), seed=3)


@pytest.fixture(scope="module")
def world(folder):
    """The engine, its tokenizer, and a loop that lives as long."""
    recipe = Recipe.model_validate(
        {
            "model": {"path": str(folder), "dtype": "float32", "max_context": 128},
            "data": {"train": "gsm-mini"},
            "rollout": {"max_tokens": 64},
            "actor": {"max_sequences": 32, "kv_cache_mb": 64},
        }
    )
    engine = Engine(**engine_arguments(recipe, "test"))
    with asyncio.Runner() as runner:
        runner.run(engine.warm_up())
        yield engine, runner
        engine.shutdown()


@pytest.fixture(scope="module")
def reference(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def sample(world, texts, count: int, sampling: Sampling):
    engine, runner = world
    encode = Prompts(engine.tokenizer, Template("no", str)).encode

    async def all_of_them():
        return await asyncio.gather(*(engine.generate(encode(t), count, sampling) for t in texts))

    return [(encode(t), found) for t, found in zip(texts, runner.run(all_of_them()), strict=True)]


@torch.no_grad()
def logprobs(model, prompt, tokens, temperature: float) -> np.ndarray:
    """Log-probability of each response token at `temperature`, float32 [T]."""
    ids = torch.tensor([[*prompt, *tokens.tolist()]])
    logits = model(ids).logits[0, len(prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(-1, torch.from_numpy(tokens).long()[:, None])[:, 0].numpy()


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_recorded_logprobs_are_those_of_the_sampling_distribution(world, reference, temperature):
    answers = sample(world, GENERATION, 4, Sampling(temperature, 40))
    compared, finishes = 0, set()
    for prompt, samples in answers:
        assert len(samples) == 4
        for found in samples:
            expected = logprobs(reference, prompt, found.tokens, temperature)
            np.testing.assert_allclose(found.logprobs, expected, atol=1e-4)
            assert found.tokens.dtype == np.int32
            assert found.logprobs.dtype == np.float32
            assert found.versions == [(0, len(found.tokens))]
            compared += len(found.tokens)
            finishes.add(found.finish)
            assert (found.finish == "stop") == (found.tokens[-1] == EOS)
            assert found.finish == "stop" or len(found.tokens) == 40
    assert finishes == {"stop", "length"}
    assert compared > 500
    if temperature != 1.0:  # the raw log-probabilities would be far away
        raw = logprobs(reference, prompt, found.tokens, 1.0)
        assert np.abs(raw - found.logprobs).max() > 0.1


def test_samples_of_a_group_differ_and_greedy_is_the_argmax(world, reference):
    (prompt, samples), *_ = sample(world, GENERATION[:1], 8, Sampling(1.0, 40))
    assert len({tuple(found.tokens) for found in samples}) > 4
    ((prompt, (greedy,)),) = sample(world, GENERATION[:1], 1, Sampling(0.0, 20))
    with torch.no_grad():
        expected = reference.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=EOS
        )[0, len(prompt) :]
    assert greedy.tokens.tolist() == expected.tolist()


def test_stop_strings_end_a_response_and_all_its_tokens_are_kept(world, reference):
    engine, _ = world
    ((prompt, (free,)),) = sample(world, GENERATION[:1], 1, Sampling(0.0, 30))
    stop = free.text[5:7]
    end = free.text.index(stop) + 2
    for include in (True, False):
        ((_, (found,)),) = sample(world, GENERATION[:1], 1, Sampling(0.0, 30, (stop,), include))
        assert found.finish == "stop"
        assert found.text == (free.text[:end] if include else free.text[: end - 2])
        # What was sampled is what is recorded: the stop string's tokens too, whatever the text shows.
        assert found.tokens.tolist() == free.tokens[: len(found.tokens)].tolist()
        assert engine.tokenizer.decode(found.tokens.tolist()) == free.text[:end]
        expected = logprobs(reference, prompt, found.tokens, 1.0)
        np.testing.assert_allclose(found.logprobs, expected, atol=1e-4)


def test_context_ends_a_response(world):
    engine, _ = world
    ((prompt, samples),) = sample(world, ["9" * 110], 16, Sampling(1.0, 64))
    cut = [found for found in samples if found.finish == "length"]
    assert cut
    assert {len(prompt) + len(found.tokens) for found in cut} == {engine.max_context}


def test_actors_draw_different_random_numbers():
    assert sampler_seed(42, "a") != sampler_seed(42, "b")
    assert sampler_seed(42, "a") == sampler_seed(42, "a") != sampler_seed(43, "a")
