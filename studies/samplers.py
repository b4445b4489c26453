"""Sampling a model for analysis: a small one with transformers, a large one with vLLM or over an endpoint.

Invariant: every sampler gives the text that the verifier reads, cut at the template's stop string, and says
whether the response came to an end by itself.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from common.tasks.templates import Template
from studies.openai_client import OpenAIClient, at_once
from studies.study import Setting
from studies.zoo import where

BATCH = 48  # prompts decoded together


class Response(NamedTuple):
    """One response; `tokens` is its length, 0 where an endpoint does not tell."""

    text: str
    tokens: int
    finished: bool


class Sampler(Protocol):
    """What a study needs of a model."""

    def sample(
        self,
        questions: Sequence[str],
        template: Template,
        *,
        samples: int,
        temperature: float,
        max_tokens: int,
        seed: int = 0,
    ) -> list[list[Response]]:
        """`samples` responses to each question; temperature 0 is greedy."""


def sampler_of(name: str, seed: int, setting: Setting) -> Sampler:
    """The sampler of a model of the zoo under a setting."""
    if setting.endpoint is not None:
        assert setting.endpoint_model is not None
        return EndpointSampler(OpenAIClient(setting.endpoint, setting.endpoint_model))
    if setting.full:
        return _engine(where(name, seed, setting))
    return LocalSampler(where(name, seed, setting))


def request_seed(seed: int, number: int) -> int:
    """31 bits for question `number` of a repetition.

    Engines give sample i of a request the seed of the request + i: with seeds that are next to one another,
    repetitions and questions would share all samples but one.
    """
    return random.Random(f"{seed}/{number}").getrandbits(31)


class LocalSampler:
    """A small model on one CPU core."""

    def __init__(self, folder: str) -> None:
        from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

        self._model = Qwen2ForCausalLM.from_pretrained(folder).eval()
        self._tokenizer = Qwen2Tokenizer.from_pretrained(folder)

    def sample(
        self,
        questions: Sequence[str],
        template: Template,
        *,
        samples: int,
        temperature: float,
        max_tokens: int,
        seed: int = 0,
    ) -> list[list[Response]]:
        import torch

        from learner.pretraining.probe import sample_responses

        torch.manual_seed(seed)
        found: list[list[Response]] = []
        for start in range(0, len(questions), BATCH):
            prompts = [template.render(question) for question in questions[start : start + BATCH]]
            ids = sample_responses(
                self._model,
                self._tokenizer,
                prompts,
                samples=samples,
                max_tokens=max_tokens,
                temperature=temperature,
            )
            responses = [decode(row, self._tokenizer, template) for row in ids.tolist()]
            found += [responses[i : i + samples] for i in range(0, len(responses), samples)]
        return found


def decode(ids: list[int], tokenizer: Any, template: Template) -> Response:
    """Text and length of padded token ids; the end token counts."""
    ended = tokenizer.eos_token_id in ids
    tokens = ids.index(tokenizer.eos_token_id) if ended else len(ids)
    text, stopped = cut(tokenizer.decode(ids[:tokens]), template)
    return Response(text, tokens + ended, ended or stopped)


def cut(text: str, template: Template) -> tuple[str, bool]:
    """The text up to the template's first stop string, and whether there was one."""
    places = [(text.find(stop), stop) for stop in template.stop if stop in text]
    if not places:
        return text, False
    place, stop = min(places)
    return text[: place + (len(stop) if template.include_stop else 0)], True


class EndpointSampler:
    """A model behind an OpenAI-compatible server."""

    def __init__(self, client: OpenAIClient) -> None:
        self._client = client

    def sample(
        self,
        questions: Sequence[str],
        template: Template,
        *,
        samples: int,
        temperature: float,
        max_tokens: int,
        seed: int = 0,
    ) -> list[list[Response]]:
        sampling: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens}
        if template.stop:
            sampling["stop"] = template.stop

        def ask(number: int) -> list[Response]:
            own = {**sampling, "seed": request_seed(seed, number)}
            choices = self._client.complete(template.render(questions[number]), samples, **own)
            return [_received(choice, template) for choice in choices]

        return at_once(ask, range(len(questions)))


def _received(choice: Any, template: Template) -> Response:
    finished = choice.get("finish_reason") == "stop"
    text = choice["text"]
    # Servers drop the stop string; the answer tag's rule needs it.
    if finished and template.include_stop and "<answer>" in text and not text.endswith(template.stop[0]):
        text += template.stop[0]
    return Response(text, 0, finished)


_running: dict[str, EngineSampler] = {}


def _engine(model: str) -> EngineSampler:
    """The engine of a model; the one before is ended first, since two do not fit on a GPU."""
    if model not in _running:
        for other in _running.values():
            other.close()
        _running.clear()
        _running[model] = EngineSampler(model)
    return _running[model]


class EngineSampler:
    """A model in a vLLM engine of this machine, through the actors' own engine."""

    def __init__(self, model: str, **arguments: Any) -> None:
        from actors.engine import Engine

        self._engine = Engine(model=model, **arguments)
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(self._engine.warm_up())

    def sample(
        self,
        questions: Sequence[str],
        template: Template,
        *,
        samples: int,
        temperature: float,
        max_tokens: int,
        seed: int = 0,
    ) -> list[list[Response]]:
        from actors.engine import Sampling

        tokenizer = self._engine.tokenizer
        prompts = [tokenizer.encode(template.render(question)) for question in questions]

        async def ask(number: int) -> list[Response]:
            sampling = Sampling(
                temperature,
                max_tokens,
                tuple(template.stop),
                template.include_stop,
                seed=request_seed(seed, number),
            )
            found = await self._engine.generate(prompts[number], samples, sampling)
            return [Response(s.text, len(s.tokens), s.finish == "stop") for s in found]

        async def everything() -> list[list[Response]]:
            return list(await asyncio.gather(*(ask(number) for number in range(len(prompts)))))

        return self._loop.run_until_complete(everything())

    def close(self) -> None:
        """End the engine's process."""
        self._engine.shutdown()
        self._loop.close()
