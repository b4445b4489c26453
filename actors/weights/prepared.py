"""Engine-ready weights, made beside the model while it generates, so that a commit only swaps pointers (CPU).

Invariant: until `swap` the live model is not written to; `swap` binds, in every layer, the parameters and the
packed multiplication that were made from one complete staged version. What cannot be prepared for certain is
not: `prepare` returns None and the commit loads the version through vLLM's own reload.

On the CPU vLLM packs each linear layer's weight after loading, which costs several passes over the weights. On
a GPU the layers must keep their storage (CUDA graphs point to it), so there the reload copies in place.

How: a shadow of the module tree (same classes, same attributes, own parameters) is filled by the model's own
`load_weights` and packed by each layer's own quantisation method.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

LOGGER = logging.getLogger("slipstream.actor.weights")

_TREE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


class PreparedModel:
    """A shadow whose layers hold a version, ready to be swapped in."""

    def __init__(self, pairs: list[tuple[nn.Module, nn.Module]]) -> None:
        self._pairs = pairs

    def swap(self) -> None:
        """Gives every live layer its shadow's parameters and packed weights."""
        for live, shadow in self._pairs:
            live._parameters.update(shadow._parameters)
            own = {k: v for k, v in shadow.__dict__.items() if k not in _TREE}
            live.__dict__.update(own)


def prepare(
    model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]], vllm_config: Any
) -> PreparedModel | None:
    """A shadow of `model` holding `weights` (checkpoint names and layout).

    Returns:
        None when the engine compiles its model (the compiled code holds the parameters), uses LoRA or
        quantisation, or when anything about this model or vLLM is not as expected.
    """
    if not _swappable(vllm_config):
        return None
    try:
        return _prepare(model, weights)
    except Exception as error:  # an unknown layer or vLLM: the ordinary reload takes over
        LOGGER.warning("weights: prepared commit not possible, reloading instead: %s", error)
        return None


def _swappable(vllm_config: Any) -> bool:
    compiled = int(getattr(vllm_config.compilation_config, "mode", 1) or 0) != 0
    quantised = vllm_config.model_config.quantization is not None
    return not (compiled or quantised or vllm_config.lora_config is not None)


@torch.no_grad()
def _prepare(model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> PreparedModel:
    shadows: dict[nn.Module, nn.Module] = {}
    shadow = _shadow_of(model, shadows)
    for live, copy in shadows.items():
        _fresh_parameters(live, copy)
    _tie(shadows)
    loaded = shadow.load_weights(weights)
    missing = {name for name, _ in shadow.named_parameters()} - set(loaded)
    if missing:
        raise RuntimeError(f"parameter {min(missing)} was not loaded")
    for copy in shadows.values():
        if copy._parameters and (method := getattr(copy, "quant_method", None)) is not None:
            method.process_weights_after_loading(copy)
    return PreparedModel([(live, copy) for live, copy in shadows.items() if copy._parameters])


def _shadow_of(module: nn.Module, shadows: dict[nn.Module, nn.Module]) -> nn.Module:
    """The same tree of the same classes; attributes are shared, containers of parameters are not."""
    if module in shadows:
        return shadows[module]
    copy = module.__class__.__new__(module.__class__)
    copy.__dict__.update(module.__dict__)
    copy.__dict__["_parameters"] = dict(module._parameters)
    copy.__dict__["_buffers"] = dict(module._buffers)
    copy.__dict__["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    shadows[module] = copy
    copy.__dict__["_modules"] = {
        name: None if child is None else _shadow_of(child, shadows) for name, child in module._modules.items()
    }
    return copy


def _fresh_parameters(live: nn.Module, copy: nn.Module) -> None:
    """Empty parameters in checkpoint layout, as they were before the live layer's were packed."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor
    from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

    recorded, _ = get_layerwise_info(live).restore_metadata
    for name, parameter in live._parameters.items():
        if name in recorded:
            fresh = materialize_meta_tensor(recorded[name])
        elif parameter is not None:  # biases are not recorded: their layout never changes
            fresh = torch.nn.Parameter(torch.empty_like(parameter), requires_grad=False)
            fresh.__dict__.update(parameter.__dict__)
        else:
            continue
        copy._parameters[name] = restore_layer_refs(fresh, copy)


def _tie(shadows: dict[nn.Module, nn.Module]) -> None:
    """What is one parameter in the live model (a tied output head) is one in the shadow."""
    first: dict[int, nn.Parameter] = {}
    for live, name, parameter in _bound(shadows):
        if parameter.numel():  # packed layers all hold an empty one
            copy = shadows[live]
            copy._parameters[name] = first.setdefault(id(parameter), copy._parameters[name])


def _bound(shadows: dict[nn.Module, nn.Module]) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for live in shadows:
        for name, parameter in live._parameters.items():
            if parameter is not None:
                yield live, name, parameter
