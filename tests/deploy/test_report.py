"""The summary counts what survived, and says null where nothing was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.tracking.spool import Spool
from deploy.report import draw_progress, read_points, read_summary, summarise, write_summary

FINAL = {
    "run": "r",
    "step": 4,
    "version": 4,
    "first_lease_time": 100.0,
    "last_commit_time": 110.0,
    "resumed": False,
    "evaluations": [
        {"version": 4, "pass1": 0.9, "greedy": 0.95},
        {"version": 0, "pass1": 0.4, "greedy": 0.5},
    ],
    "staleness": {"mean": 0.5, "max": 2},
    "peers": {"a": {"role": "actor", "tokens": 500}, "l": {"role": "learner", "tokens": 0}},
    "ledger": {"leased": 3, "consumed": 3, "sum_ok": True},
}
END = {"status": "finished", "reason": "done", "final": FINAL}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipe.toml").write_text("")
    spool = Spool(tmp_path / "metrics.jsonl")
    for step, reward in enumerate([0.1, 0.2, 0.3, 0.4]):
        spool.append("learner", step, _train(reward))
    return tmp_path


def _train(reward: float) -> dict[str, float]:
    seconds = {"waiting": 1.0, "training": 3.0, "publishing": 0.0, "checkpointing": 0.0}
    values = {f"seconds_{name}": value for name, value in seconds.items()}
    return {**values, "reward": reward, "tokens_per_s": 100.0, "length": 9.0}


def test_summary_of_a_run(folder: Path) -> None:
    summary = summarise(folder, END)
    assert summary["seconds"] == 10.0
    assert (summary["heldout_pass1_first"], summary["heldout_pass1_last"]) == (0.4, 0.9)
    assert summary["heldout_greedy_last"] == 0.95
    assert summary["reward_last"] == 0.4
    assert summary["learner_idle_share"] == 0.25
    assert summary["actor_tokens_per_s"] == 50.0
    resumed = summarise(folder, END | {"final": FINAL | {"resumed": True}})
    assert resumed["actor_tokens_per_s"] is None, "tokens of the last start over the seconds of all"
    assert summary["mismatch_max"] is None
    write_summary(folder, summary)
    assert read_summary(folder) == json.loads(json.dumps(summary))


def test_steps_lost_in_a_rewind_do_not_count(folder: Path) -> None:
    Spool(folder / "metrics.jsonl").append("learner", 1, _train(0.7))
    steps, rewards = read_points(folder).series("learner", "reward")
    assert (steps, rewards) == ([0, 1], [0.1, 0.7])


def test_nothing_measured_is_null(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("")
    (tmp_path / "metrics.jsonl").write_text("")
    bare = {**FINAL, "evaluations": [], "first_lease_time": None, "last_commit_time": None}
    summary = summarise(tmp_path, {**END, "final": bare})
    for key in ("seconds", "heldout_pass1_last", "reward_last", "learner_idle_share", "actor_tokens_per_s"):
        assert summary[key] is None
    assert draw_progress(tmp_path, []).stat().st_size > 5000


def test_figure_is_a_picture(folder: Path) -> None:
    assert draw_progress(folder, FINAL["evaluations"]).read_bytes().startswith(b"\x89PNG")
