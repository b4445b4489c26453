"""Which checkpoints exist, are chosen, are kept: whatever crashes and full disks leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.errors import UserError
from learner import checkpoint
from learner.checkpoint import Checkpoints, Saved, best
from learner.ranks import Ranks
from learner.schedule import lr_factor
from tests.learner.tiny import tiny_recipe

ALONE = Ranks(0, 1, torch.device("cpu"))


class Shards:
    """Stands for DeepSpeed's writer, so that it can be made to fail half-way."""

    def __init__(self) -> None:
        self.fails: Exception | None = None

    def save_checkpoint(self, folder: str, tag: str, client_state: dict, save_latest: bool) -> None:
        target = Path(folder) / tag
        target.mkdir()
        (target / "shard.pt").write_text(str(client_state["step"]))
        if self.fails is not None:
            raise self.fails


@pytest.fixture
def engine():
    return SimpleNamespace(deepspeed=Shards(), policy=torch.nn.Linear(2, 2))


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", tiny_recipe(learner={"keep_last": 2}), ALONE)


def steps(checkpoints: Checkpoints) -> list[int]:
    return [saved.step for saved in checkpoints.complete()]


def test_the_pointer_names_the_newest_and_never_more_than_the_ledger_knows(checkpoints, engine):
    for step in (2, 4):
        checkpoints.save(engine, step, lambda folder: folder.mkdir())
    pointer = json.loads((checkpoints.folder / "latest.json").read_text())
    assert pointer == {"step": 4, "folder": "step-000004"}
    assert (checkpoints.folder / "step-000004" / "hf").is_dir()
    assert checkpoints.newest(10).step == 4
    assert checkpoints.newest(3).step == 2
    assert checkpoints.newest(1) is None


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("writer failed")])
def test_a_full_disk_leaves_the_checkpoint_before(checkpoints, engine, error):
    checkpoints.save(engine, 2, lambda _: None)
    engine.deepspeed.fails = error
    assert checkpoints.save(engine, 4, lambda _: None) is None
    assert steps(checkpoints) == [2]
    assert checkpoints.failures == 1
    assert [path.name for path in checkpoints.folder.iterdir() if "partial" in path.name] == []
    engine.deepspeed.fails = None
    assert checkpoints.save(engine, 6, lambda _: None).step == 6


def test_too_little_room_is_seen_before_writing(checkpoints, engine, monkeypatch):
    monkeypatch.setattr(checkpoint, "free_bytes", lambda _: 10)
    assert checkpoints.save(engine, 2, lambda _: None) is None
    assert steps(checkpoints) == []


def test_a_half_written_checkpoint_is_never_chosen(checkpoints, engine):
    checkpoints.save(engine, 2, lambda _: None)
    for name in (".partial-000004", ".deleted-000004", "step-xyz", "step-"):
        (checkpoints.folder / name).mkdir()
    (checkpoints.folder / "latest.json").write_text('{"step": 4, "fol')
    assert checkpoints.newest(100).step == 2
    assert checkpoints.save(engine, 4, lambda _: None).step == 4


def test_an_ended_history_is_set_aside_and_may_be_written_again(checkpoints, engine):
    for step in (2, 4, 6):
        checkpoints.save(engine, step, lambda _: None)
    checkpoints.discard_after(2)
    assert steps(checkpoints) == [2]
    for _ in range(2):
        checkpoints.save(engine, 4, lambda _: None)
    assert steps(checkpoints) == [2, 4]


def test_the_last_n_and_the_best_are_kept(checkpoints, engine):
    for step in range(1, 7):
        checkpoints.save(engine, step, lambda _: None)
    checkpoints.prune({0: 0.9, 2: 0.7, 4: 0.6})
    assert steps(checkpoints) == [1, 5, 6]  # the evaluation of version 0 is the newest known to step 1
    checkpoints.prune({})
    assert steps(checkpoints) == [5, 6]


def test_best_is_the_later_of_equals_and_needs_an_evaluation():
    saved = [Saved(step, Path(str(step))) for step in (2, 4, 6)]
    assert best(saved, {2: 0.5, 4: 0.8, 6: 0.8}) == [saved[2]]
    assert best(saved, {8: 1.0}) == []


def test_a_resumed_run_cannot_change_what_the_state_is_bound_to(tmp_path):
    before = tiny_recipe().model_dump(mode="json")
    changed = Checkpoints(tmp_path, tiny_recipe(model={"dtype": "bfloat16"}), ALONE)
    with pytest.raises(UserError, match=r"model\.dtype: .*'float32'"):
        changed._compare(before)
    with pytest.raises(UserError, match=r"^lora"):
        Checkpoints(tmp_path, tiny_recipe(lora={"rank": 4}), ALONE)._compare(before)
    Checkpoints(tmp_path, tiny_recipe(learner={"lr": 1.0}), ALONE)._compare(before)


def test_schedules():
    constant, cosine = lr_factor("constant", 4, 100), lr_factor("cosine", 4, 104)
    assert [constant(step) for step in (0, 3, 4, 99)] == [0.2, 0.8, 1.0, 1.0]
    assert [cosine(step) for step in (0, 3, 4)] == [0.2, 0.8, 1.0]
    assert cosine(54) == pytest.approx(0.5)
    assert cosine(104) == pytest.approx(0.0)
    assert all(cosine(step) >= cosine(step + 1) for step in range(4, 104))
