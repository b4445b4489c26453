"""vLLM as a user starts it, with an actor's engine settings: the reference of several benchmarks."""

from __future__ import annotations

from typing import Any

from common.recipe import Recipe

OURS = ("worker_extension_cls", "scheduler_cls")  # what ties an engine to an actor


def bare_arguments(recipe: Recipe) -> dict[str, Any]:
    """Arguments of `vllm.LLM`: model, lengths, KV cache and sampler as in an actor, all classes vLLM's own."""
    from actors.engine import engine_arguments, for_this_device

    arguments = for_this_device(engine_arguments(recipe, "reference"))
    if recipe.actor.tensor_parallel == 1:
        arguments["distributed_executor_backend"] = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
    else:
        arguments["distributed_executor_backend"] = "mp"
    return {name: value for name, value in arguments.items() if name not in OURS}
