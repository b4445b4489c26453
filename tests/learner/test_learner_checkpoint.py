"""Which checkpoints exist, are chosen, are kept: whatever crashes and full disks leave behind."""

from __future__ import annotations

import errno
import itertools
import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from common.errors import UserError
from learner import checkpoint, main
from learner.checkpoint import Checkpoints, Saved, best
from learner.durable import damage_of
from learner.main import NO_ROOM, Learner
from learner.metrics import Clock
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
        torch.save({"step": client_state["step"]}, target / "shard.pt")
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
    assert checkpoints.to_resume(10).step == 4
    assert checkpoints.to_resume(3).step == 2


def test_checkpoints_ahead_of_the_ledger_are_refused_and_not_deleted(checkpoints, engine):
    """The broker was away while the learner trained on: starting from the base model would cost the whole run."""
    assert checkpoints.to_resume(0) is None, "there is none at all: a new run"
    checkpoints.save(engine, 2, lambda _: None)
    with pytest.raises(UserError, match="up to step 1, where the broker stands"):
        checkpoints.to_resume(1)
    assert steps(checkpoints) == [2]


def test_a_checkpoint_that_was_cut_short_is_set_aside_for_the_one_before(checkpoints, engine):
    for step in (2, 4):
        checkpoints.save(engine, step, lambda _: None)
    shard = checkpoints.folder / "step-000004" / "shard.pt"
    os.truncate(shard, shard.stat().st_size - 10)
    assert checkpoints.to_resume(10).step == 2
    assert (checkpoints.folder / ".damaged-000004" / "shard.pt").exists()
    os.truncate(checkpoints.folder / "step-000002" / "shard.pt", 0)
    for _ in range(2):  # also when all are set aside: the base model would cost the whole run
        with pytest.raises(UserError, match="damaged or missing"):
            checkpoints.to_resume(10)


@pytest.mark.parametrize("when", ["opened", "read"])
def test_what_cannot_be_read_just_now_is_not_called_damaged(checkpoints, engine, monkeypatch, when):
    """A disk that answers EIO for a while, a mount that is stale: the files may be whole."""
    checkpoints.save(engine, 2, lambda _: None)
    shard = checkpoints.folder / "step-000002" / "shard.pt"
    content = shard.read_bytes()
    if when == "opened":
        shard.unlink()
        shard.symlink_to(shard)  # too many levels of symbolic links
    else:

        def broken(file: object) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr("zipfile._EndRecData", broken)
    for look in (checkpoints.to_resume, lambda _: damage_of(shard.parent)):
        with pytest.raises(OSError, match=r"symbolic links|Input/output error"):
            look(2)
    assert steps(checkpoints) == [2]
    monkeypatch.undo()
    shard.unlink()
    shard.write_bytes(content)
    assert checkpoints.to_resume(2).step == 2
    assert damage_of(shard.parent) is None


def test_a_checkpoint_that_was_called_damaged_stays_until_a_later_one_is_safe(checkpoints, engine):
    for step in (2, 4):
        checkpoints.save(engine, step, lambda _: None)
    os.truncate(checkpoints.folder / "step-000004" / "shard.pt", 10)
    assert checkpoints.to_resume(4).step == 2
    for step, kept in ((3, True), (4, False)):
        checkpoints.save(engine, step, lambda _: None)
        checkpoints.prune({})
        assert (checkpoints.folder / ".damaged-000004").exists() is kept


@pytest.mark.parametrize("damaged", [True, False])
def test_what_cannot_be_loaded_is_set_aside_only_if_it_is_damaged(checkpoints, engine, damaged):
    checkpoints.save(engine, 2, lambda _: None)
    shard = checkpoints.folder / "step-000002" / "shard.pt"
    if damaged:  # in the middle, where nothing shows it but a checksum
        content = bytearray(shard.read_bytes())
        content[content.index(b"step") + 1] ^= 255
        shard.write_bytes(content)
    assert checkpoints.to_resume(2).step == 2

    def fail(folder: str, tag: str) -> None:
        raise RuntimeError("cannot load")  # or the GPU's memory is full

    engine.deepspeed.load_checkpoint = fail
    with pytest.raises(RuntimeError, match="cannot load"):
        checkpoints.load(engine, 2)
    assert steps(checkpoints) == ([] if damaged else [2])


def test_files_are_on_the_disk_before_the_checkpoint_has_its_name(checkpoints, engine, monkeypatch):
    order: list[str] = []
    sync = checkpoint.to_disk
    monkeypatch.setattr(checkpoint, "to_disk", lambda path: (order.append(path.name), sync(path)))
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: (order.append("renamed"), rename(self, to))[1])
    checkpoints.save(engine, 2, lambda folder: folder.mkdir())
    assert set(order[:3]) == {"shard.pt", "hf", ".partial-000002"}
    assert order[3:] == ["renamed", "checkpoints"]


@pytest.mark.parametrize(("rank", "files"), [
    (0, {"zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt", "hf"}),
    (1, {"bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"}),
])  # fmt: skip
def test_each_rank_sees_to_its_own_files_before_it_waits_for_the_others(tmp_path, monkeypatch, rank, files):
    """Only the host that wrote a file can bring it to the disk, and rank 0 must not keep the others waiting."""
    order: list[str] = []
    ranks = SimpleNamespace(
        rank=rank, leads=rank == 0, device=ALONE.device, gather=lambda values: [values],
        barrier=lambda: order.append("barrier"),
    )  # fmt: skip
    monkeypatch.setattr(checkpoint, "to_disk", lambda path: order.append(path.name))
    written = Checkpoints(tmp_path, tiny_recipe(), ranks)
    partial = tmp_path / ".partial-000002"

    def shards(*_: object, **__: object) -> None:
        (partial / "hf").mkdir(parents=True)
        for name in ("zero_pp_rank_0", "bf16_zero_pp_rank_1", "zero_pp_rank_10"):
            (partial / f"{name}_mp_rank_00_optim_states.pt").touch()
        (partial / "mp_rank_00_model_states.pt").touch()

    engine = SimpleNamespace(deepspeed=SimpleNamespace(save_checkpoint=shards))
    written._write(engine, 2, partial, lambda folder: None)
    assert (order[0], order[-1]) == ("barrier", "barrier")
    assert set(order[1:-1]) == files


def test_what_a_crash_left_behind_is_removed_at_the_start(checkpoints, engine):
    checkpoints.save(engine, 2, lambda _: None)
    for name in (".partial-000004", ".deleted-000001"):
        (checkpoints.folder / name).mkdir()
        (checkpoints.folder / name / "shard.pt").write_text("much")
    checkpoints.discard_after(2)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["latest.json", "step-000002"]


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), RuntimeError("writer failed"), SafetensorError("io error")],
)
def test_a_full_disk_leaves_the_checkpoint_before(checkpoints, engine, error):
    checkpoints.save(engine, 2, lambda _: None)
    engine.deepspeed.fails = error
    assert checkpoints.save(engine, 4, lambda _: None) is None
    assert steps(checkpoints) == [2]
    assert checkpoints.failures == 1
    assert [path.name for path in checkpoints.folder.iterdir() if "partial" in path.name] == []
    engine.deepspeed.fails = None
    assert checkpoints.save(engine, 6, lambda _: None).step == 6


def test_a_pointer_that_cannot_be_written_costs_no_checkpoint(checkpoints, engine):
    checkpoints.save(engine, 2, lambda _: None)
    (checkpoints.folder / "latest.json.tmp").mkdir()
    assert checkpoints.save(engine, 4, lambda _: None).step == 4
    assert steps(checkpoints) == [2, 4]
    assert json.loads((checkpoints.folder / "latest.json").read_text())["step"] == 2


def test_too_little_room_is_seen_before_writing(checkpoints, engine, monkeypatch):
    monkeypatch.setattr(checkpoint, "free_bytes", lambda _: 10)
    assert checkpoints.save(engine, 2, lambda _: None) is None
    assert steps(checkpoints) == []


def test_a_half_written_checkpoint_is_never_chosen(checkpoints, engine):
    checkpoints.save(engine, 2, lambda _: None)
    for name in (".partial-000004", ".deleted-000004", "step-xyz", "step-"):
        (checkpoints.folder / name).mkdir()
    (checkpoints.folder / "latest.json").write_text('{"step": 4, "fol')
    assert checkpoints.to_resume(100).step == 2
    assert checkpoints.save(engine, 4, lambda _: None).step == 4


def test_an_ended_history_is_set_aside_and_may_be_written_again(checkpoints, engine):
    for step in (2, 4, 6):
        checkpoints.save(engine, step, lambda _: None)
    checkpoints.discard_after(2)
    assert steps(checkpoints) == [2]
    assert {path.name for path in checkpoints.folder.glob(".*")} == {".ahead-000004", ".ahead-000006"}
    for _ in range(2):
        checkpoints.save(engine, 4, lambda _: None)
    assert steps(checkpoints) == [2, 4]
    checkpoints.prune({})
    assert list(checkpoints.folder.glob(".*")) == [], "a later one is safe"


def test_the_last_n_and_the_best_are_kept(checkpoints, engine):
    for step in range(1, 7):
        checkpoints.save(engine, step, lambda _: None)
    checkpoints.prune({0: 0.9, 2: 0.7, 4: 0.6})
    assert steps(checkpoints) == [1, 5, 6]  # the evaluation of version 0 is the newest known to step 1
    checkpoints.prune({})
    assert steps(checkpoints) == [5, 6]


@pytest.mark.parametrize("broker_there", [True, False])
def test_nothing_is_pruned_that_the_ledger_may_need(checkpoints, engine, monkeypatch, broker_there):
    """Of checkpoints that the broker does not know of yet, none can be resumed from: the older ones must stay."""
    for step in (1, 2, 3):
        checkpoints.save(engine, step, lambda _: None)
    link = SimpleNamespace(
        flush=lambda seconds: broker_there,
        post=lambda message: None,
        ask_accuracy=lambda: None,
        be=lambda state, waiting_for: None,
        accuracy={},
    )
    learner = Learner.__new__(Learner)
    learner._clock, learner._link, learner._checkpoints = Clock(), link, checkpoints
    learner._engine, learner._step, learner._export = engine, 4, lambda folder: None
    learner._checkpoint()
    assert steps(checkpoints) == ([3, 4] if broker_there else [1, 2, 3, 4])


class Link:
    """Stands for the learner's line to the broker; `when_waiting` is called when it says that it waits for room."""

    command, accuracy = "run", {}

    def __init__(self, when_waiting) -> None:
        self.when_waiting, self.left = when_waiting, None

    def be(self, state, waiting_for):
        if state == NO_ROOM:
            self.when_waiting()

    def flush(self, seconds):
        self.command = "stop"  # the broker knows of the last step, and its evaluation is in
        return True

    def close(self, reason, flush_s):
        self.left = reason
        return True

    def post(self, message):
        pass

    check = ask_accuracy = lambda self: None


@pytest.mark.parametrize("freed", [True, False])
def test_no_run_is_finished_without_its_last_checkpoint(checkpoints, engine, monkeypatch, freed):
    """The disk is full when the last step is done: the learner waits for room, or for a signal."""
    monkeypatch.setattr(main, "SAVE_AGAIN_S", 0.0)
    monkeypatch.setattr(main, "leave_ranks", lambda ranks: None)
    stop = threading.Event()

    def somebody_acts() -> None:
        engine.deepspeed.fails = None if freed else OSError(28, "No space left on device")
        if not freed:
            stop.set()

    learner = Learner.__new__(Learner)
    link = learner._link = Link(somebody_acts)
    learner._recipe, learner._clock, learner._checkpoints, learner._ranks = (
        checkpoints._recipe,
        Clock(),
        checkpoints,
        ALONE,
    )
    learner._engine, learner._stop, learner._export = engine, stop, lambda folder: None
    learner._step, learner._loop = 6, lambda: "finished"
    learner._feed = learner._push = engine.deepspeed
    engine.close = engine.deepspeed.close = lambda: None
    engine.deepspeed.fails = OSError(28, "No space left on device")
    assert learner.run() == (0 if freed else 1)
    assert steps(checkpoints) == ([6] if freed else [])
    assert link.left == ("finished" if freed else "stopped: there is no checkpoint of the last step")
    assert checkpoints.failures == (0 if freed else 2)


def test_the_broker_has_its_time_to_evaluate_from_when_it_knows_of_the_last_step(monkeypatch):
    """Away when the last step was done: the learner would be gone with its commit."""
    answers = [False] * 3 + [True] * 100
    learner = Learner.__new__(Learner)
    learner._link = SimpleNamespace(
        check=lambda: None, command="run", be=lambda *said: None, flush=lambda seconds: answers.pop(0)
    )
    learner._recipe, learner._ranks = tiny_recipe(broker={"final_eval_s": 50.0, "dead_after_s": 10.0}), ALONE
    learner._stop = threading.Event()
    clock = itertools.count(0.0, 25.0)
    monkeypatch.setattr(
        main, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda seconds: None)
    )
    assert learner._wait_for_the_end() == "finished"
    assert answers == [True] * 99, "asked until it knew"


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
