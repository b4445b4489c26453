"""What a commit asks of a GPU: that a relay to a dead child occupies another stream of it must not hold generation up."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from actors.weights.worker import WeightReceiverExtension
from common.weights.protocol import LinkSpec


@pytest.fixture
def calls(monkeypatch):
    """What was waited for, and when."""
    noted = []
    stream = SimpleNamespace(synchronize=lambda: noted.append("own stream"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: noted.append("whole device"))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *_: noted.append("whole device"))
    return noted


class Worker(WeightReceiverExtension):
    """As far as vLLM's GPU worker concerns a commit."""

    rank, device, vllm_config = 0, torch.device("cuda", 0), None

    def synchronize_device(self) -> None:
        torch.accelerator.synchronize()


def test_a_reload_waits_for_its_own_stream_only(calls, monkeypatch):
    worker = Worker()
    worker.model_runner = SimpleNamespace(reload_weights=lambda weights_iterator: calls.append("reloaded"))
    config = SimpleNamespace(set_current_vllm_config=lambda _: nullcontext())
    monkeypatch.setitem(sys.modules, "vllm.config", config)
    worker._slipstream_reload(SimpleNamespace(tensors=lambda: iter(())))
    assert calls == ["reloaded", "own stream"]


def test_a_pause_waits_for_the_models_stream_only(calls):
    """vLLM calls `synchronize_device` of every worker at the end of `pause_generation`."""
    worker = Worker()
    worker.slipstream_weights_connect(LinkSpec("gloo://127.0.0.1:1/token", "run", "a.0", 1, 0.1).to_dict())
    worker.synchronize_device()
    worker.slipstream_weights_disconnect()
    assert calls == ["own stream"]


def test_vllm_has_what_is_replaced():
    from vllm.v1.worker.worker_base import WorkerBase

    assert hasattr(WorkerBase, "synchronize_device")
