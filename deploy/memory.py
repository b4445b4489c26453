"""Peak memory of a recipe, predicted from the model's sizes.

Invariant: every term has a name and a formula, so that a wrong prediction shows which term is wrong.
All figures are bytes. Parameter counts come from `common.model_files.ModelShape`.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.model_files import ModelShape
from common.recipe import Recipe

GIB = 1 << 30
MIB = 1 << 20
# Resident memory of an idle Python process with its libraries, measured on CPU (docs/benchmarks.md).
LEARNER_BASE = 700 * MIB
ACTOR_BASE = 1300 * MIB
# Numbers kept per token and layer for the backward pass, in units of the hidden size, beside the MLP's
# (attention in and out, query / key / value, two norms, two residuals).
SAVED_PER_LAYER = 10


@dataclass(frozen=True)
class MemoryPlan:
    """Named terms in bytes; `total` is the predicted peak of one process."""

    terms: dict[str, float]

    @property
    def total(self) -> float:
        """Sum of the terms."""
        return sum(self.terms.values())


def _width(recipe: Recipe) -> int:
    return 4 if recipe.model.dtype == "float32" else 2


def learner_memory(recipe: Recipe, shape: ModelShape) -> MemoryPlan:
    """Peak of one learner rank.

    ZeRO 1 shards optimizer state, 2 gradients too, 3 weights too (arXiv 1910.02054). bf16 keeps fp32 master
    weights and accumulates gradients in fp32. Activations are those of one packed micro-batch.
    """
    n, ranks, stage = float(shape.parameters), recipe.learner.ranks, recipe.learner.zero_stage
    width = _width(recipe)
    master = 4 * n if width == 2 else 0.0
    state = (8 * n + master) / (ranks if stage >= 1 else 1)
    gradients = 4 * n / (ranks if stage >= 2 else 1)
    weights = width * n / (ranks if stage == 3 else 1)
    tokens = recipe.learner.micro_batch_tokens
    per_layer = SAVED_PER_LAYER * shape.hidden + 3 * shape.intermediate
    kept_layers = 1 if recipe.learner.gradient_checkpointing else shape.layers
    activations = width * tokens * (kept_layers * per_layer + shape.layers * shape.hidden)
    logits = 3 * 4 * min(tokens, recipe.learner.logprob_chunk_tokens) * shape.vocab
    reference = width * n if recipe.algorithm.kl_beta or recipe.algorithm.kl_in_reward else 0.0
    return MemoryPlan(
        {
            "weights": weights,
            "gradients": gradients,
            "optimizer state": state,
            "activations": float(activations),
            "logits of one chunk": float(logits),
            "reference model": reference,
            "weight snapshot": width * n,
            "process": float(LEARNER_BASE),
        }
    )


def actor_memory(recipe: Recipe, shape: ModelShape, device: str) -> MemoryPlan:
    """Peak of one tensor-parallel rank of an actor; on GPUs vLLM takes what `gpu_memory_utilization` says."""
    width, ranks = _width(recipe), recipe.actor.tensor_parallel
    weights = width * shape.parameters / ranks
    cache_mb = recipe.actor.kv_cache_mb or (1024 if device == "cpu" else 0)
    return MemoryPlan(
        {
            "weights": weights,
            "staged weights": weights,
            "KV cache": float(cache_mb * MIB),
            "process": float(ACTOR_BASE),
        }
    )
