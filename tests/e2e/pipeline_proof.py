"""Runs the whole pipeline with the actor in this process, then looks inside its engine.

usage: python -m tests.e2e.pipeline_proof RECIPE  (run folder prepared; broker and learner are started here)

Prints one JSON object: what the vLLM worker's weights and greedy answers are, and what the learner exported.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # this test sends a function into the worker

import torch

from actors.engine import Engine, Sampling, engine_arguments
from actors.main import Actor
from common.recipe import Recipe, load_recipe
from common.tasks import minimath
from common.tasks.templates import get_template
from common.wire import AsyncClient, hello
from deploy.folder import wait_for_address
from tests.scripted.wait import until

QUESTIONS = 24
GREEDY = Sampling(0.0, 48)


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()).hexdigest()


def live_weights(worker: object) -> dict[str, str]:
    """Digests of the weights that the worker computes with, by vLLM's names.

    vLLM's CPU kernels keep linear weights packed; applied to the identity they give them back exactly.
    """
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    found = {}
    for name, module in worker.model_runner.get_model().named_modules():  # type: ignore[attr-defined]
        if isinstance(module, LinearBase):
            columns = module.quant_method.apply(module, torch.eye(module.input_size_per_partition), None)
            found[f"{name}.weight"] = digest(columns.T)
            if module.bias is not None:
                found[f"{name}.bias"] = digest(module.bias)
        elif isinstance(module, ParallelLMHead):
            columns = module.quant_method.apply(module, torch.eye(module.embedding_dim), None)
            found[f"{name}.weight"] = digest(columns.T[: module.org_vocab_size])
        elif isinstance(module, VocabParallelEmbedding):
            found[f"{name}.weight"] = digest(module.weight[: module.org_vocab_size])
        elif name.endswith("norm"):
            found[f"{name}.weight"] = digest(module.weight)
    return found


def exported_weights(folder: Path) -> dict[str, str]:
    """The same digests from a Hugging Face export: query, key, value and gate, up put together as vLLM does."""
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    fused = {
        "q_proj": ("qkv_proj", "q_proj k_proj v_proj"),
        "gate_proj": ("gate_up_proj", "gate_proj up_proj"),
    }
    found = {}
    for name, tensor in weights.items():
        parts = name.split(".")
        module = parts[-2]
        if module in ("k_proj", "v_proj", "up_proj"):
            continue
        if module in fused:
            whole, members = fused[module]
            tensor = torch.cat([weights[name.replace(module, member)] for member in members.split()])
            name = name.replace(module, whole)
        found[name] = digest(tensor)
    found.setdefault("lm_head.weight", found["model.embed_tokens.weight"])  # tied
    return found


async def greedy_answers(engine: Engine, recipe: Recipe) -> list[list[int]]:
    """Greedy token ids for held-out questions."""
    template = get_template(recipe.data.template, model=recipe.model.path)
    prompts = [template.render(q.problem) for q in list(minimath.minimath("demo-heldout"))[:QUESTIONS]]
    ids = [engine.tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    samples = await asyncio.gather(*(engine.generate(prompt, 1, GREEDY) for prompt in ids))
    return [sample[0].tokens.tolist() for sample in samples]


class KeptActor(Actor):
    """An actor whose engine outlives the order to stop, so that it can be looked at."""

    async def live(self) -> str:
        shutdown, self._engine.shutdown = self._engine.shutdown, lambda *arguments: None
        try:
            return await super().live()
        finally:
            self._engine.shutdown = shutdown


async def act(engine: Engine, recipe: Recipe, address: str) -> dict[str, object]:
    """Be the run's only actor until the run ends, then describe the engine."""
    wire = AsyncClient(address, hello("actor", "actor-0", run=recipe.run.name))
    await engine.warm_up()
    actor = KeptActor(engine, recipe, wire, "actor-0", await wire.connect(None))
    way = await actor.live()
    from common.messages import Goodbye

    await wire.request(Goodbye(reason="leaving"), timeout_s=5.0)
    wire.close()
    [weights] = await engine.llm.collective_rpc(live_weights)
    return {"way": way, "weights": weights, "greedy": await greedy_answers(engine, recipe)}


def main() -> None:
    """See the module's text."""
    recipe = load_recipe(sys.argv[1])
    folder = Path(sys.argv[2])
    logs = {name: (folder / f"{name}.log").open("w") for name in ("broker", "learner")}
    engine = Engine(**engine_arguments(recipe, "actor-0"))
    command = [sys.executable, "-m", "deploy"]
    broker = subprocess.Popen(
        [*command, "broker", sys.argv[1]], stdout=logs["broker"], stderr=subprocess.STDOUT
    )

    def prepared() -> bool:
        assert broker.poll() is None
        return (recipe.folder / "recipe.toml").exists()

    until(prepared, "the broker prepares its folder")
    address = wait_for_address(recipe.folder, 120.0)["address"]
    learner = subprocess.Popen(
        [*command, "learner", "--join", address], stdout=logs["learner"], stderr=subprocess.STDOUT
    )
    found = asyncio.run(act(engine, recipe, address))
    assert learner.wait(180) == 0
    assert broker.wait(180) == 0
    engine.shutdown()
    export = max((recipe.folder / "checkpoints").glob("*/hf"), key=lambda path: path.stat().st_mtime)
    fresh = Engine(**engine_arguments(recipe, "fresh") | {"model": str(export)})

    async def ask_fresh() -> list[list[int]]:
        await fresh.warm_up()
        return await greedy_answers(fresh, recipe)

    found["greedy_fresh"] = asyncio.run(ask_fresh())
    fresh.shutdown()
    found["exported"] = exported_weights(export)
    (folder / "proof.json").write_text(json.dumps(found))
    os._exit(0)


if __name__ == "__main__":
    main()
