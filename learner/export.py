"""The policy in Hugging Face format: what `eval`, vLLM and other people's tools load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.weights import Snapshot
from learner.engine import Engine


def export_model(engine: Engine, snapshot: Snapshot | None, tokenizer: Any, folder: Path) -> None:
    """Write model and tokenizer into `folder`; on rank 0, which alone has a snapshot.

    Args:
        snapshot: whole parameters under the model's own names (adapters merged), in the dtype to save.
    """
    if snapshot is None:
        return
    lm = engine.policy.lm
    # save_pretrained may drop entries of what it is given (ties); the snapshot's tensors stay as they are.
    lm.save_pretrained(folder, state_dict=dict(snapshot.tensors()), safe_serialization=True)
    tokenizer.save_pretrained(folder)
