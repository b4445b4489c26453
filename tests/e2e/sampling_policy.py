"""A policy that draws the same responses wherever it runs: a function of its weights and of the question."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from common.messages import GroupHeader, GroupId, ResponseHeader
from common.recipe.schema import Recipe

END = 1
SEED = 11


class Sampler:
    """Draws groups from a model in float32, without a cache: slow, and a function of weights and question."""

    def __init__(self, recipe: Recipe) -> None:
        torch.set_num_threads(1)
        self._rollout = recipe.rollout
        self.model = AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=torch.float32).eval()

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take over weights; a tied head comes with its embedding."""
        outcome = self.model.load_state_dict(dict(tensors), strict=False)
        assert not outcome.unexpected_keys
        assert set(outcome.missing_keys) <= {"lm_head.weight"}

    @torch.no_grad()
    def group(self, key: GroupId, *, lease: int, actor: str, era: int, version: int):
        """A scored group of a question: header and payload."""
        count = self._rollout.group_size
        prompt = torch.tensor([2 + key.index % 50, 3, 4 + key.epoch])
        draws = torch.Generator().manual_seed(int(np.random.SeedSequence([SEED, *key]).generate_state(1)[0]))
        tokens, logprobs = prompt.repeat(count, 1), torch.empty(count, 0)
        for _ in range(self._rollout.max_tokens):
            last = torch.log_softmax(self.model(tokens).logits[:, -1] / self._rollout.temperature, -1)
            drawn = torch.multinomial(last.exp(), 1, generator=draws)
            tokens = torch.cat([tokens, drawn], 1)
            logprobs = torch.cat([logprobs, last.gather(1, drawn)], 1)
        ids = tokens[:, len(prompt) :].numpy()
        lengths = [_length(row) for row in ids]
        header = GroupHeader(
            group=key,
            lease=lease,
            era=era,
            actor=actor,
            prompt_tokens=len(prompt),
            responses=[_response(row[:n], version) for row, n in zip(ids, lengths, strict=True)],
        )
        payload = [
            prompt.numpy().astype(np.int32).tobytes(),
            np.concatenate([row[:n] for row, n in zip(ids, lengths, strict=True)]).astype(np.int32).tobytes(),
            np.concatenate([row[:n] for row, n in zip(logprobs.numpy(), lengths, strict=True)]).tobytes(),
        ]
        return header, payload


def _length(row: np.ndarray) -> int:
    ends = np.flatnonzero(row == END)
    return int(ends[0]) + 1 if len(ends) else len(row)


def _response(ids: np.ndarray, version: int) -> ResponseHeader:
    """Rewarded for even token ids: something that a policy can learn."""
    right = float(np.mean(ids % 2 == 0) > 0.5)
    return ResponseHeader(
        tokens=len(ids),
        reward=right,
        verdict="correct" if right else "wrong",
        finish="stop" if ids[-1] == END else "length",
        versions=[(version, len(ids))],
    )
