"""Whether a model's weights are on this machine is known without reading them and without a network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from common.errors import UserError
from common.model_files import require_weights

COMMIT = "0" * 40


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cached files of a model 'lab/model', as the hub's client keeps them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    root = tmp_path / "hub" / "models--lab--model"
    folder = root / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    (folder / "config.json").write_text("{}")
    return folder


def refused() -> None:
    with pytest.raises(UserError, match=r"model\.path: the weights of .*`hf download lab/model`"):
        require_weights("lab/model")


def test_what_a_check_has_fetched_is_not_the_weights(snapshot: Path) -> None:
    refused()


def test_weights_in_one_file(snapshot: Path) -> None:
    (snapshot / "model.safetensors").touch()
    require_weights("lab/model")


def test_every_shard_of_the_index_is_needed(snapshot: Path) -> None:
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (snapshot / "model-1.safetensors").touch()
    refused()
    (snapshot / "model-2.safetensors").touch()
    require_weights("lab/model")


def test_a_model_that_was_never_seen_here(snapshot: Path) -> None:
    with pytest.raises(UserError, match="hf download lab/other"):
        require_weights("lab/other")


def test_a_folder_is_what_it_is(snapshot: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    require_weights("mine")
    require_weights(str(tmp_path / "mine"))
