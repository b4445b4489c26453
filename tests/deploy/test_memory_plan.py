"""The memory plan: monotone where it must be, made of what the code it describes really does, and enforced."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.engine import CPU_KV_CACHE_MB
from common.errors import UserError
from common.model_files import KNOWN_SHAPES, ModelShape
from common.recipe import Recipe, load_recipe
from common.recipe.load import RECIPES
from common.weights.publisher import Publisher
from deploy import memory, preflight
from deploy.memory import GIB, MIB, actor_memory, learner_memory, micro_batch_tokens, trained_parameters

SHAPE = KNOWN_SHAPES["Qwen/Qwen2.5-1.5B"]


def recipe(*overrides: str) -> Recipe:
    return load_recipe("demo", ["model.max_context=4096", *overrides])


def learner(*overrides: str, shape: ModelShape = SHAPE) -> dict[str, float]:
    return learner_memory(recipe(*overrides), shape, "cpu").terms


def total(*overrides: str) -> float:
    return learner_memory(recipe(*overrides), SHAPE, "cpu").total


@given(st.sampled_from(["float32", "bfloat16"]), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 4, 8]))
def test_more_ranks_need_less_each(dtype: str, stage: int, ranks: int) -> None:
    options = [f"model.dtype='{dtype}'", f"learner.zero_stage={stage}"]
    few = total(*options, f"learner.ranks={ranks}")
    assert total(*options, f"learner.ranks={2 * ranks}") < few


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_stage_shards_more(dtype: str) -> None:
    options = [f"model.dtype='{dtype}'", "learner.ranks=8"]
    sizes = [total(*options, f"learner.zero_stage={stage}") for stage in (1, 2)]
    assert sizes == sorted(sizes, reverse=True)
    assert learner(*options, "learner.zero_stage=3")["weights"] * 8 == learner(*options)["weights"]


def test_states_of_one_rank_are_those_of_mixed_precision_training() -> None:
    """arXiv 1910.02054, section 3.1: 2 + 2 + 12 bytes per parameter, float32 gradients (+ 2) here."""
    n = SHAPE.parameters
    terms = learner("model.dtype='bfloat16'", "learner.zero_stage=2")
    assert terms["weights"] == 2 * n
    assert terms["float32 weights"] + terms["Adam moments"] == 12 * n
    assert terms["gradients"] == 4 * n


def test_checkpointing_keeps_one_number_per_state_and_layer() -> None:
    tokens = micro_batch_tokens(recipe())
    kept = learner("learner.gradient_checkpointing=true")["activations"]
    more = learner("learner.gradient_checkpointing=true", shape=_with_layers(SHAPE, SHAPE.layers + 1))
    assert more["activations"] - kept == 4 * tokens * SHAPE.hidden
    assert learner()["activations"] > 5 * kept


def _with_layers(shape: ModelShape, layers: int) -> ModelShape:
    from dataclasses import replace

    return replace(shape, layers=layers)


def test_logits_do_not_grow_with_the_micro_batch() -> None:
    small, large = (learner(f"learner.micro_batch_tokens={tokens}") for tokens in (8192, 16384))
    assert small["logits of one chunk"] == large["logits of one chunk"]
    assert small["activations"] * 2 == large["activations"]


def test_a_row_is_never_longer_than_what_a_step_has() -> None:
    few = ["batch.questions_per_step=2", "rollout.group_size=2", "learner.micro_batch_tokens=1000000"]
    assert micro_batch_tokens(recipe(*few)) == 2 * 4096
    assert micro_batch_tokens(recipe("learner.micro_batch_tokens=16")) == 4096, "one response may be longer"


def test_adapters_have_states_and_the_model_has_none() -> None:
    options = ["model.dtype='bfloat16'", "lora.rank=8"]
    assert trained_parameters(recipe(*options), SHAPE) < 0.01 * SHAPE.parameters
    whole, pushed = learner(*options, "lora.push='merged'"), learner(*options, "lora.push='adapter'")
    assert whole["Adam moments"] < 0.1 * learner("model.dtype='bfloat16'")["Adam moments"]
    assert pushed["weight snapshots"] < whole["weight snapshots"] == 2 * 2 * SHAPE.parameters


def test_a_reference_model_costs_its_weights() -> None:
    assert "reference model" not in learner()
    assert learner("algorithm.kl_beta=0.1")["reference model"] == 4 * SHAPE.parameters


def test_constants_are_those_of_the_code() -> None:
    from learner.engine import MAX_BUCKET_ELEMENTS

    assert memory.BUCKET_ELEMENTS == MAX_BUCKET_ELEMENTS
    assert memory.CPU_KV_CACHE_MB == CPU_KV_CACHE_MB
    assert inspect.signature(Publisher).parameters["max_snapshots"].default == memory.SNAPSHOTS


def test_vllm_fills_its_share_and_a_push_comes_on_top() -> None:
    size = 80 * GIB
    setting = recipe("model.dtype='bfloat16'", "actor.gpu_memory_utilization=0.5")
    plan = actor_memory(setting.model_copy(update={"actor": _no_cache(setting)}), SHAPE, "gpu", size)
    assert plan.total == pytest.approx(0.5 * size + 2 * SHAPE.parameters)
    assert actor_memory(recipe(), SHAPE, "cpu").terms["KV cache"] == 64 * MIB


def _no_cache(setting: Recipe) -> Any:
    return setting.actor.model_copy(update={"kv_cache_mb": None})


# --- enforced -------------------------------------------------------------------------------------------------


def refused(
    monkeypatch: pytest.MonkeyPatch, free: float, *overrides: str, gpu: float | None = None
) -> UserError:
    monkeypatch.setattr(preflight, "free_host_bytes", lambda: free)
    monkeypatch.setattr(preflight, "visible_gpus", lambda: ["0"] if gpu else [])
    monkeypatch.setattr(preflight, "smallest_gpu_bytes", lambda _: gpu)
    with pytest.raises(UserError) as caught:
        preflight.check_memory(recipe(*overrides), SHAPE)
    assert "\n" not in str(caught.value)
    return caught.value


def test_what_cannot_fit_is_refused_with_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    error = refused(monkeypatch, 4 * GIB)
    assert error.setting == "learner.micro_batch_tokens"
    assert "4,096 MiB are free" in str(error)
    assert refused(monkeypatch, 4 * GIB, "actor.count=64").setting == "actor.count"


def test_what_cannot_fit_a_gpu_is_refused_with_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    bf16 = "model.dtype='bfloat16'"
    assert refused(monkeypatch, 0, bf16, gpu=16 * GIB).setting == "learner.micro_batch_tokens"
    full = refused(
        monkeypatch, 0, bf16, "actor.gpu_memory_utilization=1.0", "actor.kv_cache_mb=79000", gpu=80 * GIB
    )
    assert full.setting == "actor.gpu_memory_utilization"


def test_what_fits_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "free_host_bytes", lambda: 500 * GIB)
    preflight.check_memory(recipe(), SHAPE)


@pytest.mark.parametrize(
    ("overrides", "meant"),
    [
        ([], False),
        (["model.dtype='bfloat16'"], True),
        (["launch.device='cpu'", "model.dtype='bfloat16'"], False),
    ],
)
def test_recipes_that_are_meant_for_gpus(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str], meant: bool
) -> None:
    monkeypatch.setattr(preflight, "visible_gpus", list)
    monkeypatch.setattr(preflight.os, "sched_getaffinity", lambda _: {0, 1})
    assert preflight.meant_for_gpus(recipe(*overrides)) is meant


def test_the_machine_has_some_memory() -> None:
    assert 0 < memory.free_host_bytes() < 1 << 60
    assert memory.smallest_gpu_bytes([]) is None


OF_THE_PAPER = sorted(
    path.stem for kind in ("paper", "fig8", "duet") for path in RECIPES.glob(f"{kind}-*.toml")
)


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_every_recipe_of_the_paper_fits_its_gpus(name: str) -> None:
    """8 x A100 of 80 GB."""
    made = load_recipe(name)
    shape = KNOWN_SHAPES[made.model.path]
    for plan in (learner_memory(made, shape, "gpu"), actor_memory(made, shape, "gpu", 80e9)):
        assert plan.total < 80e9, plan.terms
