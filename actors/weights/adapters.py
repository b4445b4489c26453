"""A pushed LoRA adapter into vLLM's LoRA manager.

Invariant: an engine serves at most one pushed adapter, always under the same id; a new version replaces it in
place, so that requests in flight go on with the new one exactly as they do after a full push.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from common.weights.stager import Staged

ADAPTER_ID = 1
ADAPTER_NAME = "policy"


def adapter_request(path: str = "pushed-by-the-learner", *, replace: bool = False) -> Any:
    """The `LoRARequest` that every prompt must carry once an adapter was pushed (`WeightReceiver.lora`)."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(ADAPTER_NAME, ADAPTER_ID, path, load_inplace=replace)


def load_adapter(worker: Any, staged: Staged) -> None:
    """Loads the staged adapter in the layout that peft saves, through a temporary folder.

    Raises:
        RuntimeError: the engine was started without LoRA, or refuses the adapter (its rank is above
            `max_lora_rank`, a target module has no LoRA layer).
    """
    with tempfile.TemporaryDirectory(prefix="slipstream-adapter-") as folder:
        tensors = {name: tensor.cpu() for name, tensor in staged.tensors()}
        save_file(tensors, Path(folder) / "adapter_model.safetensors")
        config = dict(staged.manifest.meta)["adapter_config"]
        (Path(folder) / "adapter_config.json").write_text(json.dumps(config))
        worker.model_runner.add_lora(adapter_request(folder, replace=True))
