"""Token-budget micro-batches of whole responses, balanced over ranks.

Invariant: every sample is in exactly one micro-batch of one rank and is never cut, every rank has the same
*number* of micro-batches (ZeRO-2/3 reduce once per backward, so a missing one hangs), and no micro-batch is
above the token budget unless it holds a single sample that is longer than the budget by itself. The plan is a
pure function of the lengths: every rank computes the same one without talking.

A micro-batch is one *row*: its samples (prompt then response) one after another, position ids restarting at 0
for each. What the objective needs is kept per response token, as 1-D tensors of length T.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

FILLER_TOKENS = 1

Item = TypeVar("Item")
PerSample: TypeAlias = Sequence[Item] | Mapping[int, Item]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One micro-batch: n samples in one row of S tokens, T of which are response tokens.

    Attributes:
        input_ids: [1, S] int64.
        position_ids: [1, S] int64, restarting at 0 for each sample.
        lengths: length in tokens of each segment of the row; they sum to S. A filler has one segment.
        state_index: [T] int64, column in the row of the state that *predicts* each response token, i.e. of
            the token before it.
        targets: [T] int64, the response tokens.
        sequence: [T] int64, local sample (0..n-1) of each response token.
        samples: the caller's index of each of the n samples; empty for a filler.
    """

    input_ids: Tensor
    position_ids: Tensor
    lengths: tuple[int, ...]
    state_index: Tensor
    targets: Tensor
    sequence: Tensor
    samples: tuple[int, ...]

    @property
    def response_lengths(self) -> Tensor:
        """[n] int64: response tokens of each sample."""
        return torch.bincount(self.sequence, minlength=len(self.samples))

    @property
    def is_filler(self) -> bool:
        """True for the row that only keeps the number of micro-batches equal over ranks; its T is 0."""
        return not self.samples

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        names = ("input_ids", "position_ids", "state_index", "targets", "sequence")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})

    def per_token(self, values: Tensor) -> Tensor:
        """Spread one value per sample of the *whole* plan ([samples]) over this row's response tokens ([T])."""
        rows = torch.as_tensor(self.samples, dtype=torch.int64, device=values.device)
        return values[rows][self.sequence.to(values.device)]

    def concatenate(self, values: PerSample[Tensor | Sequence[float]], dtype: torch.dtype) -> Tensor:
        """Join per-response-token values, one 1-D entry per sample of the whole plan, into this row's [T].

        Raises:
            ValueError: an entry's length is not its response's length.
        """
        counts = self.response_lengths.tolist()
        for sample, count in zip(self.samples, counts, strict=True):
            if len(values[sample]) != count:
                raise ValueError(
                    f"sample {sample} has {len(values[sample])} values for {count} response tokens"
                )
        parts = [torch.as_tensor(values[sample], dtype=dtype) for sample in self.samples]
        return torch.cat(parts) if parts else torch.empty(0, dtype=dtype)

    def split(self, values: Tensor) -> dict[int, Tensor]:
        """The inverse of `concatenate`: {sample: its part of `values` [T]}."""
        return dict(zip(self.samples, values.split(self.response_lengths.tolist()), strict=True))


def pack(
    samples: Sequence[int],
    prompts: PerSample[Tensor | Sequence[int]],
    responses: PerSample[Tensor | Sequence[int]],
) -> PackedBatch:
    """Build the row that holds `samples`, which index into `prompts` and `responses` (token ids; a list, or a mapping that
    holds these samples).

    No samples gives a filler: one token, no response token; a forward and backward through it adds exact zeros.

    Raises:
        ValueError: a sample has an empty prompt or an empty response.
    """
    if not samples:
        return _filler()
    for sample in samples:
        if not len(prompts[sample]) or not len(responses[sample]):
            raise ValueError(
                f"sample {sample} has an empty {'response' if len(prompts[sample]) else 'prompt'}"
            )
    tokens, positions, states, sequence, lengths = [], [], [], [], []
    start = 0
    for row, sample in enumerate(samples):
        prompt = torch.as_tensor(prompts[sample], dtype=torch.int64)
        response = torch.as_tensor(responses[sample], dtype=torch.int64)
        length = len(prompt) + len(response)
        tokens += [prompt, response]
        positions.append(torch.arange(length))
        states.append(torch.arange(start + len(prompt) - 1, start + length - 1))
        sequence.append(torch.full((len(response),), row))
        lengths.append(length)
        start += length
    return PackedBatch(
        input_ids=torch.cat(tokens)[None],
        position_ids=torch.cat(positions)[None],
        lengths=tuple(lengths),
        state_index=torch.cat(states),
        targets=torch.cat(tokens[1::2]),
        sequence=torch.cat(sequence),
        samples=tuple(samples),
    )


def _filler() -> PackedBatch:
    none = torch.empty(0, dtype=torch.int64)
    zero = torch.zeros((1, FILLER_TOKENS), dtype=torch.int64)
    return PackedBatch(zero, zero, (FILLER_TOKENS,), none, none, none, ())


def plan_micro_batches(
    lengths: Sequence[int],
    *,
    ranks: int,
    token_budget: int,
    crossover: int | None = None,
    samples: Sequence[int] | None = None,
) -> list[list[list[int]]]:
    """Split samples into micro-batches: `plan[rank][i]` lists the samples of that rank's i-th micro-batch.

    First-fit decreasing finds how many rows the budget needs; the count is rounded up to a multiple of `ranks`
    and the samples are dealt again, longest first, each to the cheapest row with room, which evens the rows out
    and leaves none empty while there are samples enough. Rows of similar cost get the same index i on all ranks,
    since ranks meet after each micro-batch; the dearest row of each i goes to the rank with the least so far.

    Args:
        lengths: tokens (prompt + response) of each sample.
        ranks: data-parallel ranks, at least 1.
        token_budget: tokens that one row may hold, at least 1.
        crossover: sample length at which attention costs as much as all the rest of the model, about 12 ×
            hidden size; None counts tokens only. See `cost`.
        samples: which of them to plan for (those of one optimizer step); None plans for all.

    Returns:
        `ranks` lists of equal length. An empty inner list is a filler (see `pack`). No samples: empty lists.
    """
    if ranks < 1 or token_budget < 1:
        raise ValueError(f"ranks ({ranks}) and token_budget ({token_budget}) must be at least 1")
    chosen = range(len(lengths)) if samples is None else samples
    if not chosen:
        return [[] for _ in range(ranks)]
    order = sorted(chosen, key=lambda sample: (-lengths[sample], sample))
    rows = _first_fit(order, lengths, token_budget)
    count = -(-len(rows) // ranks) * ranks
    rows = _balanced(order, lengths, token_budget, count, crossover) or rows + [[]] * (count - len(rows))
    return _deal(rows, lengths, ranks, crossover)


def cost(length: int, crossover: int | None) -> float:
    """Work of one sample in token units: L + L² / crossover.

    A dense decoder layer of width d has about 12 d² weights, hence 24 d² FLOPs per token, and causal attention
    adds 2 d L: equal at L = 12 d.
    """
    return length + (length * length / crossover if crossover else 0.0)


def optimizer_steps(samples: int, steps: int, seed: int) -> list[list[int]]:
    """Deal a batch to `steps` optimizer steps in a random order that depends on `seed` only.

    The paper splits 1024 responses into 8 × 128; groups need not stay together, since advantages are computed
    before. Sizes differ by at most one.
    """
    order = list(range(samples))
    random.Random(seed).shuffle(order)
    bounds = [samples * step // steps for step in range(steps + 1)]
    return [order[low:high] for low, high in pairwise(bounds)]


def _first_fit(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """First-fit decreasing: at most 11/9 of the fewest possible rows, plus one."""
    rows: list[list[int]] = []
    room: list[int] = []
    for sample in order:
        place = next((row for row, free in enumerate(room) if free >= lengths[sample]), None)
        if place is None:
            rows.append([sample])
            room.append(budget - lengths[sample])
        else:
            rows[place].append(sample)
            room[place] -= lengths[sample]
    return rows


def _balanced(
    order: Sequence[int], lengths: Sequence[int], budget: int, count: int, crossover: int | None
) -> list[list[int]] | None:
    """Longest processing time first into `count` rows under the budget; None if a sample finds no room."""
    rows: list[list[int]] = [[] for _ in range(count)]
    tokens, costs = [0] * count, [0.0] * count
    for sample in order:
        length = lengths[sample]
        fitting = [row for row in range(count) if not tokens[row] or tokens[row] + length <= budget]
        if not fitting:
            return None
        row = min(fitting, key=lambda candidate: (costs[candidate], candidate))
        rows[row].append(sample)
        tokens[row] += length
        costs[row] += cost(length, crossover)
    return rows


def _deal(
    rows: Sequence[list[int]], lengths: Sequence[int], ranks: int, crossover: int | None
) -> list[list[list[int]]]:
    """Give each rank one row of every `ranks` neighbours in order of cost."""
    work = {id(row): sum(cost(lengths[sample], crossover) for sample in row) for row in rows}
    ordered = sorted(rows, key=lambda row: (-work[id(row)], row))
    plan: list[list[list[int]]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for start in range(0, len(ordered), ranks):
        lightest_first = sorted(range(ranks), key=lambda rank: (load[rank], rank))
        for rank, row in zip(lightest_first, ordered[start : start + ranks], strict=True):
            plan[rank].append(row)
            load[rank] += work[id(row)]
    return plan
