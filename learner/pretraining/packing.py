"""Packing documents into rows.

Invariant: a document is never cut and never attends to its neighbours: positions restart at 0 in each, from
which the model derives its block-diagonal mask, so training sees what generation will see.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import Qwen2Tokenizer

from learner.pretraining.corpus import Document

# Documents to choose from when a row is filled: rows are about 95 % full.
_POOL = 64


@dataclass(frozen=True)
class Batch:
    """Packed rows, each tensor [rows, row_tokens].

    `weights` (float32) is the loss weight of predicting each token from its predecessor; it is 0 on a
    document's first token and on padding.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    weights: torch.Tensor


def batches(
    stream: Iterator[Document],
    tokenizer: Qwen2Tokenizer,
    *,
    rows: int,
    row_tokens: int,
    prompt_weight: float,
) -> Iterator[Batch]:
    """Endless batches; a document longer than a row is skipped."""
    pending = _encoded(stream, tokenizer, row_tokens)
    pool = [next(pending) for _ in range(_POOL)]
    while True:
        packed = [_Row(row_tokens, tokenizer.pad_token_id) for _ in range(rows)]
        for row in packed:
            while (best := _longest_that_fits(pool, row.room)) is not None:
                row.add(*pool[best], prompt_weight)
                pool[best] = next(pending)
        yield Batch(
            torch.tensor([row.ids for row in packed]),
            torch.tensor([row.positions for row in packed]),
            torch.tensor([row.weights for row in packed]),
        )


def _encoded(
    stream: Iterator[Document], tokenizer: Qwen2Tokenizer, longest: int, chunk: int = 256
) -> Iterator[tuple[list[int], int]]:
    """(token ids, tokens of the prompt), encoded in chunks because single calls are slow."""
    while True:
        some = [next(stream) for _ in range(chunk)]
        prompts = tokenizer([d.prompt for d in some])["input_ids"]
        responses = tokenizer([d.response for d in some])["input_ids"]
        for prompt, response in zip(prompts, responses, strict=True):
            if len(prompt) + len(response) <= longest:
                yield prompt + response, len(prompt)


def _longest_that_fits(pool: list[tuple[list[int], int]], room: int) -> int | None:
    fitting = [(len(ids), -i) for i, (ids, _) in enumerate(pool) if len(ids) <= room]
    return -max(fitting)[1] if fitting else None


class _Row:
    """A row under construction, padded from the start."""

    def __init__(self, size: int, pad: int) -> None:
        self.ids, self.positions, self.weights = [pad] * size, list(range(size)), [0.0] * size
        self._used = 0

    @property
    def room(self) -> int:
        return len(self.ids) - self._used

    def add(self, ids: list[int], prompt_tokens: int, prompt_weight: float) -> None:
        """Places a document that fits."""
        start, end = self._used, self._used + len(ids)
        self.ids[start:end] = ids
        self.positions[start:end] = range(len(ids))
        # What remains is padding and counts as one more document.
        self.positions[end:] = range(len(self.ids) - end)
        weights = [prompt_weight] * prompt_tokens + [1.0] * (len(ids) - prompt_tokens)
        self.weights[start:end] = [0.0, *weights[1:]]
        self._used = end
