"""The policy as it is now, copied out of DeepSpeed bucket by bucket.

Invariant: peak extra memory is one snapshot (rank 0) plus one gathered bucket (every rank), at every ZeRO
stage; the model itself is not changed. Names, shapes and dtypes are those of the model's own checkpoint
(tied weights once, adapters merged) or, for `adapters_only`, of the adapter that peft would save.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.errors import UserError
from common.weights import Manifest, Snapshot, SnapshotBuilder, TensorSpec
from common.weights.layout import DEFAULT_BUCKET_BYTES, Bucket, sent_dtype

_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Part:
    """One tensor to be sent: the parameters that it is computed from, and how, once they are gathered."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    sources: tuple[nn.Parameter, ...]
    compute: Callable[[], Tensor]


def take_snapshot(
    engine_or_module: Any,
    *,
    dtype: torch.dtype | None = None,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    device: torch.device | str = "cpu",
    adapters_only: bool = False,
    pinned: bool = False,
) -> Snapshot | None:
    """Copies the policy on rank 0; collective, all ranks must call it (ZeRO-3 gathers on every rank).

    Args:
        engine_or_module: a DeepSpeed engine at any ZeRO stage, or a plain module.
        dtype: floating-point parameters are converted to it on the way; None keeps theirs.
        bucket_bytes: payload of a bucket, in bytes as sent.
        device: where the copy lives.
        pinned: see `SnapshotBuilder`.
        adapters_only: send the LoRA adapter alone, for an engine that serves it as a LoRA.

    Returns:
        The snapshot on rank 0, None elsewhere.

    Raises:
        UserError: `adapters_only` for a policy without adapters.
    """
    model = policy_of(engine_or_module)
    parts = list(adapter_parts(model) if adapters_only else full_parts(model))
    manifest = _manifest(model, parts, dtype, adapters_only=adapters_only)
    builder = SnapshotBuilder(manifest, bucket_bytes, device, pinned=pinned)
    by_name = {part.name: part for part in parts}
    keeps = not dist.is_initialized() or dist.get_rank() == 0
    for bucket in builder.layout:
        _gather_bucket(builder, bucket, by_name, keeps=keeps)
    return builder.build() if keeps else None


def policy_of(engine_or_module: Any) -> nn.Module:
    """The language model inside DeepSpeed's engine, the policy wrapper (`.lm`) and peft's wrapper."""
    model = engine_or_module
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    if isinstance(inner := getattr(model, "lm", None), nn.Module):
        model = inner
    peft_base = getattr(model, "base_model", None)
    if peft_base is not None and hasattr(peft_base, "peft_config"):
        model = peft_base.model
    return model


def full_parts(model: nn.Module) -> Iterator[Part]:
    """Every parameter of the model's checkpoint, once; a layer with an adapter gives its merged weight."""
    adapted = _adapted_layers(model)
    for name, parameter in model.named_parameters():
        layer_name, _, kind = name.rpartition(".")
        if any(name.startswith(f"{path}.lora_") for path in adapted):
            continue
        path = layer_name.removesuffix(".base_layer")
        if path in adapted and kind == "weight":
            yield _merged(f"{path}.weight", parameter, adapted[path])
        else:
            yield _plain(f"{path}.{kind}" if path else kind, parameter)


def adapter_parts(model: nn.Module) -> Iterator[Part]:
    """The adapter's matrices under the names that peft saves them by."""
    for path, layer in _adapted_layers(model).items():
        adapter = _active_adapter(layer)
        for matrix in ("lora_A", "lora_B"):
            yield _plain(f"{_PEFT_PREFIX}{path}.{matrix}.weight", getattr(layer, matrix)[adapter].weight)


def _plain(name: str, parameter: nn.Parameter) -> Part:
    return Part(name, _whole_shape(parameter), parameter.dtype, (parameter,), lambda: parameter)


def _merged(name: str, weight: nn.Parameter, layer: Any) -> Part:
    """W + alpha / rank * B A (Hu et al., arXiv 2106.09685, section 4.1), summed in float32."""
    adapter = _active_adapter(layer)
    sources = (weight, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight)

    def compute() -> Tensor:
        return weight.float() + layer.get_delta_weight(adapter).float()

    return Part(name, _whole_shape(weight), weight.dtype, sources, compute)


def _adapted_layers(model: nn.Module) -> dict[str, Any]:
    return {path: layer for path, layer in model.named_modules() if hasattr(layer, "lora_A")}


def _active_adapter(layer: Any) -> str:
    (adapter,) = layer.active_adapters  # one policy, one adapter
    return adapter


def _whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of the whole parameter; under ZeRO-3 `parameter.shape` is that of nothing at all."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _manifest(
    model: nn.Module, parts: list[Part], dtype: torch.dtype | None, *, adapters_only: bool
) -> Manifest:
    specs = tuple(TensorSpec(part.name, sent_dtype(part.dtype, dtype), part.shape) for part in parts)
    if not adapters_only:
        return Manifest(specs)
    if not parts:
        raise UserError("the policy has no adapters to push", setting="lora.push")
    return Manifest(specs, "adapter", {"adapter_config": _adapter_config(model)})


def _adapter_config(model: nn.Module) -> dict[str, object]:
    """What vLLM reads of peft's adapter_config.json."""
    config = next(iter(model.peft_config.values()))
    targets = config.target_modules
    return {
        "peft_type": "LORA",
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "bias": "none",
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
    }


def _gather_bucket(builder: SnapshotBuilder, bucket: Bucket, parts: dict[str, Part], *, keeps: bool) -> None:
    """One bucket: an all-gather on every rank (ZeRO-3), a copy on rank 0."""
    chosen = [parts[slot.spec.name] for slot in bucket.slots]
    with torch.no_grad(), _whole([source for part in chosen for source in part.sources]):
        if keeps:
            builder.fill(bucket, _Computed(chosen))


class _Computed(dict):
    """Tensors of a bucket by name, each computed when it is copied, so that merged ones do not pile up."""

    def __init__(self, parts: list[Part]) -> None:
        super().__init__({part.name: part for part in parts})

    def __getitem__(self, name: str) -> Tensor:
        return super().__getitem__(name).compute()


def _whole(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
    """Makes partitioned parameters whole for the duration of the context."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(partitioned, modifier_rank=None)
