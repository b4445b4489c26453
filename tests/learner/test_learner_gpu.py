"""What the learner does differently on GPUs, as far as that shows without one."""

from __future__ import annotations

import os

import pytest
import torch

import learner.main
import learner.ranks
from common.errors import UserError
from learner.main import Learner
from tests.learner.tiny import tiny_recipe


@pytest.fixture
def four_ranks(monkeypatch):
    """The environment of the third of four ranks on a host with GPUs."""
    launched = {"RANK": 2, "LOCAL_RANK": 2, "WORLD_SIZE": 4, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for name, value in launched.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(learner.ranks, "die_with_parent", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize(("seen", "said"), [(1, "sees 1 GPU:"), (2, "sees 2 GPUs:")])
def test_ranks_that_do_not_see_all_gpus_of_their_host_are_refused(four_ranks, monkeypatch, seen, said):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    with pytest.raises(UserError, match=rf"learner\.ranks.*rank 2 of this host {said}.*--gpu-bind=none"):
        learner.ranks.start_ranks(60.0)


class StartedError(Exception):
    """Ranks are about to be started."""


@pytest.mark.parametrize(
    ("sections", "environment", "expected"),
    [
        ({}, {}, "expandable_segments:True"),
        ({"weights": {"route": "disk"}}, {}, "expandable_segments:True"),
        ({"weights": {"route": "ipc"}}, {}, None),
        ({"launch": {"shared_gpu": True}}, {}, None),
        ({}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}, None),
        ({}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}, "max_split_size_mb:512"),
    ],
)
def test_segments_of_gpu_memory_may_grow_where_no_handle_shares_them(
    monkeypatch, sections, environment, expected
):
    """Read by torch at the first use of CUDA, so it must stand before the ranks start."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def start(*_: object) -> None:
        raise StartedError

    monkeypatch.setattr(learner.main, "check_model", lambda _: None)
    monkeypatch.setattr(learner.main, "start_ranks", start)
    one = Learner(tiny_recipe(**sections), None, None, None, None)
    with pytest.raises(StartedError):
        one.start(resume=False)
    assert os.environ.get("PYTORCH_ALLOC_CONF") == expected
