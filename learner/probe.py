"""The learner's half of a probe: what the policy, as it is published, says of some tokens that it was trained on.

Invariant: every rank evaluates one row, so that sharded weights are gathered by all.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.weights.probe import PROBE_TOKENS, Probe
from learner.engine import Engine
from learner.packing import PackedBatch, pack


def take_probe(engine: Engine, batch: PackedBatch) -> Probe | None:
    """Probe the policy as it is now with the beginning of `batch`'s first sequence; collective.

    Args:
        batch: a row of the step that was trained last, which may be a filler.

    Returns:
        None for a filler.
    """
    tokens = batch.input_ids[0, : min(batch.lengths[0], PROBE_TOKENS)].tolist()
    row = _row(tokens)
    logprobs, _, _ = engine.evaluate(row, temperature=1.0)
    return None if row.is_filler else Probe(tuple(tokens), tuple(logprobs.tolist()))


def _row(tokens: Sequence[int]) -> PackedBatch:
    return pack([0], [tokens[:1]], [tokens[1:]]) if len(tokens) > 1 else pack([], [], [])
