"""What the engine's model expects to be sent: names, shapes and dtypes of its checkpoint.

Invariant: an offer that does not fit is refused before a byte of it is received. Built from the model's
configuration on the meta device: no weights are read, none allocated.
"""

from __future__ import annotations

from typing import Any

import torch

from common.weights.layout import Manifest, TensorSpec


def expected_manifest(model_config: Any) -> Manifest:
    """Manifest of a full push for an engine with vLLM `model_config`: tied weights once, engine dtype.

    Raises:
        ValueError: transformers cannot build the architecture (custom code that is not trusted).
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            model_config.hf_config, trust_remote_code=model_config.trust_remote_code
        )
    dtype = str(model_config.dtype).removeprefix("torch.")
    model.tie_weights()
    specs = [TensorSpec(name, dtype, tuple(p.shape)) for name, p in model.named_parameters()]
    return Manifest(tuple(specs))
