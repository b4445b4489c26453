"""What a published group must satisfy beyond its schema, without decoding it (I7, I8).

Invariant: a group that passes has G responses, buffers of exactly the announced sizes, token ids within the
vocabulary and finite log-probabilities; anything else raises `MalformedMessage` and touches no state.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from broker.profile import Profile
from broker.store import Buffer
from common.messages import GroupHeader, MalformedMessage
from common.recipe.schema import Recipe

ANY_TOKEN = 2**31 - 1
# Float error of a log-softmax in half precision may leave a log-probability just above 0.
LOGPROB_SLACK = 1e-3


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a group: all in tokens but `group_size`, responses per group."""

    group_size: int
    max_tokens: int
    max_prompt_tokens: int
    vocabulary: int

    @classmethod
    def of(cls, recipe: Recipe) -> Limits:
        """The bounds that a recipe implies."""
        return cls(
            group_size=recipe.rollout.group_size,
            max_tokens=recipe.rollout.max_tokens,
            max_prompt_tokens=recipe.model.max_context,
            vocabulary=vocabulary_size(recipe.model.path),
        )


def vocabulary_size(model: str) -> int:
    """Rows of the model's output head, from its config.json: in a folder or the local hub cache.

    A hub model that is not on the broker's host gives the widest bound, any non-negative int32: the broker
    downloads nothing.
    """
    local = Path(model) / "config.json"
    path = local if local.is_file() else _cached_config(model)
    if path is None:
        return ANY_TOKEN
    config = json.loads(path.read_text(encoding="utf-8"))
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    return int(size) if size else ANY_TOKEN


def _cached_config(model: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def check_group(header: GroupHeader, profile: Profile, payload: Sequence[Buffer], limits: Limits) -> None:
    """Raise `MalformedMessage` unless the group is whole and its payload is what the header says.

    Args:
        header: validated against its schema already.
        profile: of that header.
        payload: prompt ids int32 [P], response ids int32 [sum T], log-probabilities float32 [sum T].
        limits: bounds of the recipe.
    """
    lengths, prompt = profile.lengths, header.prompt_tokens
    if len(lengths) != limits.group_size:
        raise MalformedMessage(f"{len(lengths)} responses; a group has {limits.group_size}")
    if max(lengths) > limits.max_tokens:
        raise MalformedMessage(
            f"a response of {max(lengths)} tokens; rollout.max_tokens is {limits.max_tokens}"
        )
    if prompt > limits.max_prompt_tokens:
        raise MalformedMessage(f"a prompt of {prompt} tokens; the context has {limits.max_prompt_tokens}")
    sizes, tokens = [len(part) for part in payload], profile.tokens
    if sizes != [4 * prompt, 4 * tokens, 4 * tokens]:
        raise MalformedMessage(f"payload of {sizes} bytes; the header announces {list(header.payload_sizes)}")
    _check_ids(payload[0], limits.vocabulary, "prompt")
    _check_ids(payload[1], limits.vocabulary, "response")
    _check_logprobs(payload[2])


def _check_ids(buffer: Buffer, vocabulary: int, what: str) -> None:
    ids = np.frombuffer(buffer, dtype="<u4")  # a negative int32 reads as a huge uint32: one comparison does
    if np.maximum.reduce(ids) >= vocabulary:
        raise MalformedMessage(f"a {what} token id is outside the vocabulary of {vocabulary}")


def _check_logprobs(buffer: Buffer) -> None:
    values = np.frombuffer(buffer, dtype="<f4")
    highest, lowest = np.maximum.reduce(values), np.minimum.reduce(values)  # a NaN anywhere makes both NaN
    if not (np.isfinite(lowest) and highest <= LOGPROB_SLACK):
        raise MalformedMessage("a log-probability is not finite or above 0")
