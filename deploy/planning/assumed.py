"""Rates of a cluster of A100s that nobody has measured here: assumptions, each with its source.

Invariant: every figure can be replaced from the command line, and whoever prints a plan made of them prints
`sources` beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from common.errors import UserError
from deploy.planning.rates import Rates, sequence_seconds

A100_FLOPS = 312e12  # dense bf16, data sheet
A100_BYTES_S = 2.0e12  # HBM of the 80 GB card, data sheet
NODE_GPUS = 8
MFU = 0.40
MEMORY_SHARE = 0.6  # of the HBM's bandwidth that a decode step reaches
SMALLEST_STEP_S = 5e-3  # of a decode step: launches and scheduling, however small the model
REFERENCE_PARAMETERS, REFERENCE_RATE = 7.6e9, 3000.0
PROMPT_MFU = 0.5
NODE_BYTES_S, NETWORK_BYTES_S = 200e9, 20e9  # per GPU, reached: NVLink within a node, 200 Gb/s between nodes


@dataclass(frozen=True)
class Given:
    """What the caller says instead; None keeps the assumption. Units as in `slipstream plan --help`."""

    actor_rate: float | None = None
    decode_ms: float | None = None
    learner_rate: float | None = None
    update_seconds: float | None = None
    push_seconds: float | None = None

    def replaced(self) -> Mapping[str, float]:
        """What was given."""
        return {name: value for name, value in vars(self).items() if value is not None}


def a100_rates(
    parameters: float, *, slots: int, tensor_parallel: int, ranks: int, updates: int, gpus: int, given: Given
) -> Rates:
    """Rates of an actor on `tensor_parallel` A100s and of a learner on `ranks` of them.

    Args:
        parameters: of the model.
        slots: sequences that an actor decodes at once; `given.actor_rate` is meant at that number.
        updates: optimizer steps in a step.
        gpus: of the whole run; more than one node's make the network count.

    Raises:
        UserError: the given rates contradict one another.
    """
    decode_s = _decode_s(parameters, tensor_parallel, given)
    rate = given.actor_rate or actor_rate(parameters, slots, decode_s) * tensor_parallel
    try:
        sequence_s = sequence_seconds(rate, slots, decode_s)
    except ValueError as error:
        raise UserError(f"{error}.", setting="--actor-rate") from None
    bandwidth = NODE_BYTES_S if gpus <= NODE_GPUS else NETWORK_BYTES_S
    update_s = (
        given.update_seconds
        if given.update_seconds is not None
        else update_seconds(parameters, bandwidth, ranks)
    )
    push_s = given.push_seconds if given.push_seconds is not None else 2 * parameters / bandwidth
    return Rates(
        decode_s=decode_s,
        sequence_s=sequence_s,
        prompt_s=2 * parameters / (PROMPT_MFU * A100_FLOPS * tensor_parallel),
        train_token_s=1 / (ranks * (given.learner_rate or learner_rate(parameters))),
        train_fixed_s=updates * update_s,
        publish_s=2 * parameters / A100_BYTES_S * 2,  # read once, written once, in its own memory
        push_s=push_s,
        stop_s=2 * decode_s,
    )


def _decode_s(parameters: float, tensor_parallel: int, given: Given) -> float:
    if given.decode_ms is not None:
        return given.decode_ms / 1e3
    return max(SMALLEST_STEP_S, 2 * parameters / (MEMORY_SHARE * A100_BYTES_S * tensor_parallel))


def actor_rate(parameters: float, slots: int, decode_s: float) -> float:
    """Tokens per second of one A100: the reference rate, scaled by size, but no more than its steps allow."""
    return min(REFERENCE_RATE * REFERENCE_PARAMETERS / parameters, 0.8 * slots / decode_s)


def learner_rate(parameters: float) -> float:
    """Trained tokens per second of one A100: 6 FLOPs per parameter and token (forward and backward)."""
    return MFU * A100_FLOPS / (6 * parameters)


def update_seconds(parameters: float, bandwidth: float, ranks: int) -> float:
    """One optimizer step beside its tokens: float32 gradients reduced, bf16 weights gathered, over the ranks."""
    return (4 + 2) * parameters / bandwidth if ranks > 1 else 4 * parameters / A100_BYTES_S


def sources(parameters: float, slots: int, given: Given) -> list[tuple[str, str]]:
    """(figure, where it is from) for everything that was not given."""
    decode = _decode_s(parameters, 1, given)
    lines = {
        "actor_rate": (
            f"actor {actor_rate(parameters, slots, decode):,.0f} tokens/s per GPU at {slots} sequences",
            "assumed: 3,000 for 7.6 B parameters, scaled by size",
        ),
        "decode_ms": (
            f"decode step {1e3 * decode:.1f} ms and up",
            f"assumed: bf16 weights at {MEMORY_SHARE:.0%} of an A100's {A100_BYTES_S / 1e12:.0f} TB/s, at least "
            f"{1e3 * SMALLEST_STEP_S:g} ms",
        ),
        "learner_rate": (
            f"learner {learner_rate(parameters):,.0f} tokens/s per GPU",
            f"assumed: MFU {MFU:.0%} of {A100_FLOPS / 1e12:.0f} TFLOP/s, 6 FLOPs per parameter",
        ),
        "update_seconds": (
            f"optimizer step {update_seconds(parameters, NODE_BYTES_S, 2):.2g} s more in one node, "
            f"{update_seconds(parameters, NETWORK_BYTES_S, 2):.2g} s over several",
            f"assumed: gradients (float32) and weights (bf16) at {NODE_BYTES_S / 1e9:.0f} and "
            f"{NETWORK_BYTES_S / 1e9:.0f} GB/s per GPU",
        ),
        "push_seconds": (
            f"push {2 * parameters / NODE_BYTES_S:.2g} s in one node, {2 * parameters / NETWORK_BYTES_S:.2g} s over several",
            "assumed: bf16 weights at the same bandwidths",
        ),
    }
    return [line for name, line in lines.items() if name not in given.replaced()]
