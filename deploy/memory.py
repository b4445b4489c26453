"""Peak memory of a recipe, predicted from the model's sizes.

Invariant: every term has a name and a formula in the model's sizes, so that a wrong prediction shows which term is
wrong. The counts in them (numbers kept, copies made) were settled on models of 0.6, 11 and 24 M parameters. All figures
are bytes. Parameter counts come from `common.model_files.ModelShape`.

The formulas follow what DeepSpeed 0.19.8 and vLLM 0.32 allocate; `python -m benchmarks.memory` compares them with
the peaks of the real processes (docs/planning.md). On a GPU the same formulas hold with other constants, which
nobody has measured yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import pynvml

from common.model_files import ModelShape
from common.recipe import Recipe

Device = Literal["cpu", "gpu"]
GIB = 1 << 30
MIB = 1 << 20

# Memory of a process that has imported its libraries and does nothing (anonymous pages; torch 2.13, DeepSpeed
# 0.19.8, vLLM 0.32 on CPU), measured by benchmarks.memory as the reference of its run.
IMPORTS: dict[str, dict[Device, float]] = {
    "learner": {"cpu": 370 * MIB, "gpu": 0.0},
    "actor": {"cpu": 480 * MIB, "gpu": 0.0},
}
# What an engine holds beyond its imports, however small the model: gloo and DeepSpeed's tables; vLLM's forked engine
# process, whose copies of Python's heap diverge, and the verifier. On a GPU: CUDA context, kernels, NCCL (assumed).
ENGINES: dict[str, dict[Device, float]] = {
    "learner": {"cpu": 12 * MIB, "gpu": 1.5 * GIB},
    "actor": {"cpu": 390 * MIB, "gpu": 1.5 * GIB},
}

BUCKET_ELEMENTS = 50_000_000  # learner.engine.MAX_BUCKET_ELEMENTS
GATHERED_ELEMENTS = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters
SNAPSHOTS = 2  # versions that the publisher holds (common.weights.publisher)
# Numbers kept per token and layer for the backward pass of a Qwen2 / Llama layer, in hidden sizes: two RMS norms with
# their float32 intermediates, query / key / value before and after rotation, attention in and out; in intermediate
# sizes: gate, its activation, up, their product.
SAVED_HIDDEN, SAVED_INTERMEDIATE = 20, 4
# Gradients that exist at one time while one layer goes backward.
BACKWARD_HIDDEN, BACKWARD_INTERMEDIATE = 6, 2
CHUNK_COPIES = 3  # logits, probabilities, gradient of one chunk (learner.logprobs)
SAMPLER_COPIES = (
    8  # vLLM's sampler, run once with all sequences: logits, sorted values and indices (int64), ...
)
CPU_PROFILE_TOKENS = 2048  # vLLM runs so many tokens through the model once, at its start
CPU_KV_CACHE_MB = 1024  # actors.engine


@dataclass(frozen=True)
class MemoryPlan:
    """Named terms in bytes; `total` is the predicted peak of one process, `beyond_import` without its libraries."""

    terms: dict[str, float]
    imports: float

    @property
    def beyond_import(self) -> float:
        """What the recipe adds to a process that has imported its libraries."""
        return sum(self.terms.values())

    @property
    def total(self) -> float:
        """All of it."""
        return self.beyond_import + self.imports


def learner_memory(recipe: Recipe, shape: ModelShape, device: Device) -> MemoryPlan:
    """Peak of one learner rank: rank 0, which also holds the snapshots.

    ZeRO 1 shards optimizer state, 2 gradients too, 3 weights too (arXiv 1910.02054).
    """
    terms = {
        **_states(recipe, shape),
        **_activations(recipe, shape),
        "logits of one chunk": _logits(recipe, shape),
        "reference model": _reference(recipe, shape),
        "weight snapshots": _snapshots(recipe, shape, device),
        "engine": ENGINES["learner"][device],
    }
    return MemoryPlan({name: size for name, size in terms.items() if size}, IMPORTS["learner"][device])


def _width(recipe: Recipe) -> int:
    return 4 if recipe.model.dtype == "float32" else 2


def _states(recipe: Recipe, shape: ModelShape) -> dict[str, float]:
    """Weights, gradients and optimizer state. From stage 1 on DeepSpeed trains a float32 copy of its shard."""
    stage, ranks, width = recipe.effective_zero_stage, recipe.learner.ranks, _width(recipe)
    everything, trained = float(shape.parameters), float(trained_parameters(recipe, shape))
    shard = trained / ranks if stage else trained
    bucket = min(trained, BUCKET_ELEMENTS)
    terms = {
        "weights": width * everything / (ranks if stage == 3 else 1),
        "float32 weights": 4 * shard if stage else 0.0,
        "Adam moments": 8 * shard,
        "gradients": 4 * (shard if stage >= 2 else trained),
        "gradients being reduced": width * bucket + (4 * bucket if stage else 0.0),
        "gradients of the step": 4 * shard if stage else 4 * trained * (width == 4),
    }
    if stage == 1:
        terms["gradients being reduced"] = width * trained + 4 * bucket
    if stage == 3:
        terms["gathered weights"] = width * min(everything, GATHERED_ELEMENTS)
    return terms


def trained_parameters(recipe: Recipe, shape: ModelShape) -> int:
    """Weights that the optimizer holds state for: all, or those of the adapters (on every linear layer at most)."""
    if recipe.lora is None:
        return shape.parameters
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sides = 2 * (shape.hidden + query) + 2 * (shape.hidden + key) + 3 * (shape.hidden + shape.intermediate)
    return recipe.lora.rank * shape.layers * sides


def on_device(recipe: Recipe) -> bool:
    """Whether the route keeps snapshots, and what a push receives, in a GPU's memory and not in the host's."""
    if recipe.weights.route == "auto":
        return recipe.actor.tensor_parallel == 1
    return recipe.weights.route in ("nccl", "ipc")


def _snapshots(recipe: Recipe, shape: ModelShape, device: Device) -> float:
    if device == "gpu" and not (on_device(recipe) and recipe.weights.snapshots == "device"):
        return 0.0
    adapter = recipe.lora is not None and recipe.lora.push == "adapter"
    pushed = trained_parameters(recipe, shape) if adapter else shape.parameters
    return float(SNAPSHOTS * _width(recipe) * pushed)


def micro_batch_tokens(recipe: Recipe) -> int:
    """Tokens of the largest row: the budget, a single longer response, or all that an optimizer step has."""
    longest = recipe.model.max_context
    most = max(recipe.learner.micro_batch_tokens, longest)
    return min(most, recipe.responses_per_optimizer_step * longest)


def _activations(recipe: Recipe, shape: ModelShape) -> dict[str, float]:
    """Of one packed row. With checkpointing each layer keeps its input, and one layer at a time the rest."""
    tokens, width = micro_batch_tokens(recipe), _width(recipe)
    layer = SAVED_HIDDEN * shape.hidden + SAVED_INTERMEDIATE * shape.intermediate
    backward = BACKWARD_HIDDEN * shape.hidden + BACKWARD_INTERMEDIATE * shape.intermediate
    checkpointed = recipe.learner.gradient_checkpointing
    kept = shape.layers * shape.hidden + layer if checkpointed else shape.layers * layer
    return {"activations": float(width * tokens * kept), "backward": float(width * tokens * backward)}


def _logits(recipe: Recipe, shape: ModelShape) -> float:
    """Never [tokens x vocabulary]: one chunk in float32, and the head's gradient, summed in float32."""
    chunk = min(micro_batch_tokens(recipe), recipe.learner.logprob_chunk_tokens)
    return 4.0 * shape.vocab * (CHUNK_COPIES * chunk + 2 * shape.hidden)


def _reference(recipe: Recipe, shape: ModelShape) -> float:
    wanted = recipe.algorithm.kl_beta or recipe.algorithm.kl_in_reward
    return float(_width(recipe) * shape.parameters) if wanted else 0.0


def actor_memory(
    recipe: Recipe, shape: ModelShape, device: Device, gpu_bytes: float | None = None
) -> MemoryPlan:
    """Peak of one tensor-parallel rank of an actor, its front process and verifier included on CPU.

    On a GPU vLLM fills its share (`actor.gpu_memory_utilization`) with KV cache; what a push receives comes on top
    where the route stages on the device (nccl, ipc).

    Args:
        gpu_bytes: memory of one GPU; None where it is not known: then the cache is what one sequence of the longest
            context needs.
    """
    width, ranks = _width(recipe), recipe.actor.tensor_parallel
    weights = width * shape.parameters / ranks
    terms = {
        "weights": weights,
        "activations": _engine_activations(recipe, shape, device) / ranks,
        "engine": ENGINES["actor"][device],
    }
    terms["KV cache"] = _kv_cache(recipe, shape, device, sum(terms.values()), gpu_bytes)
    if device == "cpu" or on_device(recipe):
        terms["received weights"] = weights
    if device == "cpu":
        terms["packed weights"] = weights  # of the running model, beside its parameters
        terms["prepared weights"] = 2 * weights  # both again, for the version that will be swapped in
    return MemoryPlan(terms, IMPORTS["actor"][device])


def _engine_activations(recipe: Recipe, shape: ModelShape, device: Device) -> float:
    """vLLM's profile run: the widest layer of its token budget, and logits of all sequences in float32."""
    tokens = CPU_PROFILE_TOKENS if device == "cpu" else max(8192, recipe.model.max_context)
    widest = 4 * shape.hidden + 3 * shape.intermediate
    return _width(recipe) * tokens * widest + 4.0 * SAMPLER_COPIES * recipe.actor.max_sequences * shape.vocab


def _kv_cache(
    recipe: Recipe, shape: ModelShape, device: Device, besides: float, gpu_bytes: float | None
) -> float:
    if recipe.actor.kv_cache_mb is not None:
        return float(recipe.actor.kv_cache_mb * MIB)
    if device == "cpu":
        return float(CPU_KV_CACHE_MB * MIB)
    smallest = (
        _width(recipe) * shape.kv_values_per_token * recipe.model.max_context / recipe.actor.tensor_parallel
    )
    if gpu_bytes is None:
        return smallest
    return max(smallest, recipe.actor.gpu_memory_utilization * gpu_bytes - besides)


# --- what there is ------------------------------------------------------------------------------------------


def free_host_bytes() -> float:
    """Memory that new processes of this user can have: of the machine, or of the control group we are in."""
    free = float(psutil.virtual_memory().available)
    try:
        group = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2].lstrip("/")
        folder = Path("/sys/fs/cgroup") / group
        limit, used = ((folder / name).read_text() for name in ("memory.max", "memory.current"))
        return min(free, float(limit) - float(used))
    except (OSError, ValueError):  # no control group of version 2, or no limit ("max")
        return free


def smallest_gpu_bytes(gpus: Iterable[str]) -> float | None:
    """Memory of the smallest of these GPUs (indices or UUIDs); None where NVML does not tell."""
    sizes = []
    try:
        pynvml.nvmlInit()
        for name in gpus:
            find = pynvml.nvmlDeviceGetHandleByIndex if name.isdigit() else pynvml.nvmlDeviceGetHandleByUUID
            sizes.append(
                float(pynvml.nvmlDeviceGetMemoryInfo(find(int(name) if name.isdigit() else name)).total)
            )
    except pynvml.NVMLError:
        return None
    return min(sizes, default=None)
