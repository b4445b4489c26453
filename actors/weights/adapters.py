"""A pushed LoRA adapter into vLLM's LoRA manager.

Invariant: an engine serves at most one pushed adapter, always under the same id; a new version replaces it in
place, so that requests in flight go on with the new one exactly as they do after a full push.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from common.weights.layout import Manifest, TensorSpec

ADAPTER_ID = 1
ADAPTER_NAME = "policy"


def adapter_request(path: str = "pushed-by-the-learner", *, replace: bool = False) -> Any:
    """The `LoRARequest` that every prompt must carry (`WeightReceiver.lora`); read only when it is loaded."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(ADAPTER_NAME, ADAPTER_ID, path, load_inplace=replace)


def load_adapter(worker: Any, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """Loads an adapter in the layout that peft saves, through a temporary folder.

    Raises:
        RuntimeError, ValueError: the engine refuses it (its rank is above `max_lora_rank`, a target module
            has no LoRA layer).
    """
    with tempfile.TemporaryDirectory(prefix="slipstream-adapter-") as folder:
        on_host = {name: tensor.cpu() for name, tensor in tensors.items()}
        save_file(on_host, Path(folder) / "adapter_model.safetensors")
        (Path(folder) / "adapter_config.json").write_text(json.dumps(config))
        worker.model_runner.add_lora(adapter_request(folder, replace=True))


def neutral_layer(expected: Manifest) -> TensorSpec:
    """A linear layer of the model that a neutral adapter can name: the first projection of its first block."""
    for spec in expected.tensors:
        if spec.name.endswith("proj.weight") and len(spec.shape) == 2:
            return spec
    raise ValueError("the model has no projection that a LoRA adapter could name")


def load_neutral_adapter(worker: Any, layer: str, shape: list[int]) -> None:
    """Loads an adapter of rank 1 whose product is zero: it names one layer and changes nothing."""
    module = layer.removesuffix(".weight")
    stem = f"base_model.model.{module}"
    tensors = {
        f"{stem}.lora_A.weight": torch.zeros(1, shape[1]),
        f"{stem}.lora_B.weight": torch.zeros(shape[0], 1),
    }
    target = module.rpartition(".")[2]
    load_adapter(worker, tensors, {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [target]})
