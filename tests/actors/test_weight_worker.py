"""What the extension asks of a GPU when it loads a version."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import torch

from actors.weights.worker import WeightReceiverExtension


def test_a_reload_waits_for_its_own_stream_only(monkeypatch):
    """A relay to a dead child occupies another stream of the device until its deadline."""
    calls = []
    worker = WeightReceiverExtension()
    worker.device, worker.vllm_config = torch.device("cuda", 0), None
    worker.model_runner = SimpleNamespace(reload_weights=lambda weights_iterator: calls.append("reloaded"))
    config = SimpleNamespace(set_current_vllm_config=lambda _: nullcontext())
    monkeypatch.setitem(sys.modules, "vllm.config", config)
    stream = SimpleNamespace(synchronize=lambda: calls.append("own stream"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: calls.append("whole device"))
    worker._slipstream_reload(SimpleNamespace(tensors=lambda: iter(())))
    assert calls == ["reloaded", "own stream"]
