"""The policy of a run: the base model, checked before anything starts, with adapters or a value head if asked.

Invariant: whatever is wrong with `model.path` or `model.max_context` is one sentence before any weight is read,
and the loaded policy has no dropout: the probabilities that are trained are those that were sampled from (I6).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from common.errors import UserError
from common.model_files import ModelShape, read_shape, require_tokenizer
from common.recipe.schema import Recipe
from learner.logprobs import PolicyModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check_model(recipe: Recipe) -> ModelShape:
    """Read the sizes of `model.path` and check them against the recipe.

    Raises:
        UserError: no model there, no tokenizer, or a context shorter than `model.max_context`.
    """
    shape = read_shape(recipe.model.path)
    require_tokenizer(recipe.model.path)
    if shape.context < recipe.model.max_context:
        raise UserError(
            f"{recipe.model.max_context} tokens are more than the model's context of {shape.context}.",
            setting="model.max_context",
        )
    return shape


def load_tokenizer(recipe: Recipe) -> Any:
    """The tokenizer beside the model; only used to show samples and for exports."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(recipe.model.path, trust_remote_code=recipe.model.trust_remote_code)


def load_language_model(recipe: Recipe) -> nn.Module:
    """The causal language model in the recipe's dtype, without dropout."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    lm = AutoModelForCausalLM.from_pretrained(
        recipe.model.path,
        dtype=DTYPES[recipe.model.dtype],
        trust_remote_code=recipe.model.trust_remote_code,
        attn_implementation="eager",  # replaced by packed attention
    )
    _disable_dropout(lm)
    return lm


def _disable_dropout(lm: nn.Module) -> None:
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def load_policy(recipe: Recipe, *, value_head: bool) -> PolicyModel:
    """The trained policy: base model, LoRA adapters where the recipe has them, gradient checkpointing."""
    lm = load_language_model(recipe)
    if recipe.lora is not None:
        lm = with_adapters(lm, recipe)
    if recipe.learner.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    policy = PolicyModel(lm, value_head=value_head, chunk_tokens=recipe.learner.logprob_chunk_tokens)
    policy.train()
    return policy


def with_adapters(lm: nn.Module, recipe: Recipe) -> nn.Module:
    """`lm` with LoRA adapters (arXiv 2106.09685) as the recipe says, injected in place; only they are trained.

    Raises:
        UserError: the model has no such modules.
    """
    from peft import LoraConfig, inject_adapter_in_model

    assert recipe.lora is not None
    targets = recipe.lora.target_modules
    config = LoraConfig(
        r=recipe.lora.rank,
        lora_alpha=recipe.lora.alpha,  # type: ignore[arg-type]  # peft says int, and only divides it
        lora_dropout=0.0,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    try:
        return inject_adapter_in_model(config, lm)
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(reason, setting="lora.target_modules") from None


def load_reference(recipe: Recipe, device: torch.device) -> PolicyModel:
    """The base model, frozen, for the KL terms."""
    lm = load_language_model(recipe)
    reference = PolicyModel(lm, chunk_tokens=recipe.learner.logprob_chunk_tokens).to(device)
    reference.requires_grad_(False)
    return reference.eval()


def bytes_of_checkpoint(policy: nn.Module) -> int:
    """Disk that one checkpoint takes: weights, float32 master weights, two Adam moments, and the export."""
    # Under ZeRO-3 a parameter is empty here and says its whole size as `ds_numel`.
    sizes = [(getattr(p, "ds_numel", p.numel()), p) for p in policy.parameters()]
    trained = sum(size for size, p in sizes if p.requires_grad)
    everything = sum(size * p.element_size() for size, p in sizes)
    return 16 * trained + 2 * everything
