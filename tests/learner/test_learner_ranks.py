"""A rank starts alone: what DeepSpeed may not compile, and when a port is chosen."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from learner import ranks


def test_a_deepspeed_that_another_library_imported_first_compiles_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """accelerate imports it to save a model; the collective was then compiled for minutes at the first start."""
    compatible = ranks.load_deepspeed().ops.__compatible_ops__
    monkeypatch.setitem(compatible, "deepspeed_shm_comm", True)
    ranks.load_deepspeed()
    assert not compatible["deepspeed_shm_comm"]


def test_the_port_is_chosen_after_what_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that was free before DeepSpeed was imported may be taken after it."""
    for name in ranks._LAUNCHED:
        monkeypatch.setenv(name, "")  # whatever is set here goes again
        monkeypatch.delenv(name)
    chosen = []

    def load() -> SimpleNamespace:
        assert "MASTER_PORT" not in os.environ
        return SimpleNamespace(init_distributed=lambda **_: chosen.append(os.environ["MASTER_PORT"]))

    monkeypatch.setattr(ranks, "load_deepspeed", load)
    assert ranks.start_ranks(60.0).world == 1
    assert int(chosen[0]) > 0
