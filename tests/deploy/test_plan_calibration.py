"""Rates that made a run are found again in what the run left behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.journal import Journal
from broker.meters import EDGES, Meters
from common.errors import UserError
from common.recipe import Recipe, resolved_toml
from common.run_files import JOURNAL_FOLDER
from common.tracking.spool import Spool
from deploy.planning.calibrate import (
    ASSUMED_HALF_RATE,
    calibrate,
    compass_search,
    line_through,
    measured_figures,
)
from deploy.planning.rates import Rates
from deploy.planning.simulate import Outcome, simulate
from deploy.planning.workload import LogNormal, Workload

TRUE = Rates(
    decode_s=ASSUMED_HALF_RATE * 2e-4,
    sequence_s=2e-4,
    prompt_s=2e-5,
    train_token_s=2e-4,
    train_fixed_s=0.05,
    publish_s=0.01,
    push_s=0.08,
    stop_s=0.03,
)
WORKLOAD = Workload(LogNormal(20, 64), prompt_tokens=30, filtered_share=0.2)


def recipe(steps: int = 12, staleness: int = 0) -> Recipe:
    return Recipe.model_validate(
        {
            "run": {"name": "recorded", "steps": steps},
            "model": {"path": "nowhere", "dtype": "float32"},
            "data": {"train": "nothing"},
            "rollout": {"group_size": 4, "max_tokens": 64},
            "batch": {"questions_per_step": 16, "optimizer_steps": 1, "max_staleness": staleness},
            "actor": {"max_sequences": 32},
            "broker": {"heartbeat_s": 0.01, "dead_after_s": 1.0},
        }
    )


def record(folder: Path, setting: Recipe, outcome: Outcome, lengths: list[int] | None = None) -> None:
    """What broker and learner would have written of a simulated run."""
    folder.mkdir()
    (folder / "recipe.toml").write_text(resolved_toml(setting))
    spool = Spool(folder / "metrics.jsonl")
    for step, piece in enumerate(outcome.steps):
        responses = piece.staleness.total()
        count = piece.trained_tokens - responses
        values = {
            "seconds_waiting": piece.waiting_s,
            "seconds_training": piece.training_s,
            "seconds_publishing": TRUE.publish_s,
            "seconds_checkpointing": 0.0,
            "tokens_per_s": piece.trained_tokens / piece.training_s,
            "tokens": responses,
            "length": responses / (count / WORKLOAD.prompt_tokens),
            "staleness_mean": sum(lag * n for lag, n in piece.staleness.items()) / responses,
            "filtered_share": WORKLOAD.filtered_share,
            "push_staged_s": TRUE.push_s - TRUE.stop_s,
            "push_stopped_ms": 1e3 * TRUE.stop_s,
        }
        spool.append("learner", step, values)
    if lengths is not None:
        meters = Meters()
        meters.lengths["sampled"].add(lengths)
        journal = Journal(folder / JOURNAL_FOLDER)
        journal._index._db.execute(
            "INSERT INTO meta VALUES ('extra', ?)", (_packed({"meters": meters.state()}),)
        )
        journal.close()


def _packed(value: object) -> bytes:
    import msgpack

    return msgpack.packb(value)


def test_a_run_tells_its_own_rates(tmp_path: Path) -> None:
    setting = recipe()
    outcome = simulate(setting, TRUE, WORKLOAD)
    record(tmp_path / "run", setting, outcome)
    found = calibrate(tmp_path / "run")
    assert found.workload.prompt_tokens == pytest.approx(WORKLOAD.prompt_tokens, rel=0.02)
    assert found.workload.filtered_share == pytest.approx(0.2)
    assert found.rates.train_token_s == pytest.approx(TRUE.train_token_s, rel=0.02)
    assert found.rates.train_fixed_s == pytest.approx(TRUE.train_fixed_s, rel=0.05)
    assert found.rates.push_s == pytest.approx(TRUE.push_s)
    assert found.rates.actor_rate(32) == pytest.approx(TRUE.actor_rate(32), rel=0.15)
    assert "not separable" in found.notes[0]


def test_another_setting_is_predicted_from_it(tmp_path: Path) -> None:
    synchronous, later = recipe(), recipe(staleness=2)
    record(tmp_path / "run", synchronous, simulate(synchronous, TRUE, WORKLOAD))
    found = calibrate(tmp_path / "run")
    truth = simulate(later, TRUE, WORKLOAD)
    predicted = simulate(later, found.rates, found.workload, seed=1)
    assert predicted.step_s == pytest.approx(truth.step_s, rel=0.15)
    assert predicted.staleness_mean == pytest.approx(truth.staleness_mean, abs=0.3)


def test_measured_is_what_the_simulation_would_call_it(tmp_path: Path) -> None:
    setting = recipe(staleness=1)
    outcome = simulate(setting, TRUE, WORKLOAD)
    record(tmp_path / "run", setting, outcome)
    figures = measured_figures(tmp_path / "run")
    assert figures.step_s == pytest.approx(outcome.step_s, rel=1e-6)
    assert figures.learner_idle == pytest.approx(outcome.learner_idle, rel=1e-6)
    assert figures.staleness_mean == pytest.approx(outcome.staleness_mean, rel=1e-6)


def test_lengths_come_from_the_histogram_of_the_broker(tmp_path: Path) -> None:
    setting = recipe()
    lengths = [2, 5, 11, 11, 30, 60] * 50
    record(tmp_path / "run", setting, simulate(setting, TRUE, WORKLOAD), lengths)
    drawn = calibrate(tmp_path / "run").workload.lengths
    assert drawn.mean == pytest.approx(np.mean(lengths), rel=0.15)
    assert EDGES[0] == 2


@pytest.mark.parametrize(("steps", "words"), [(3, "3 committed steps"), (12, "never waited")])
def test_a_run_that_tells_too_little(tmp_path: Path, steps: int, words: str) -> None:
    setting = recipe(steps, staleness=2)
    fast = replace(TRUE, decode_s=1e-7, sequence_s=1e-7)
    record(tmp_path / "run", setting, simulate(setting, fast, WORKLOAD))
    with pytest.raises(UserError, match=words):
        calibrate(tmp_path / "run")


@given(st.floats(0, 5), st.floats(1e-3, 1), st.lists(st.integers(1, 1000), min_size=3, unique=True))
def test_a_line_is_found(fixed: float, slope: float, work: list[int]) -> None:
    x = np.array(work, float)
    found = line_through(x, fixed + slope * x)
    assert found[0] + found[1] * x == pytest.approx(fixed + slope * x, rel=1e-3, abs=1e-3)


def test_noise_is_no_fixed_cost() -> None:
    rng = np.random.default_rng(0)
    work = rng.uniform(900, 1100, 20)
    fixed, per_unit = line_through(work, work * rng.uniform(0.8, 1.2, 20))
    assert fixed == 0
    assert per_unit == pytest.approx(1, rel=0.1)


def test_a_line_never_goes_below_zero() -> None:
    assert line_through(np.array([1.0, 2.0]), np.array([2.0, 1.0])) == (0.0, 1.0)
    assert line_through(np.array([2.0, 2.0]), np.array([1.0, 1.0])) == (0.0, 0.5)


@given(st.tuples(st.floats(-5, 5), st.floats(-5, 5)))
def test_the_search_finds_a_minimum(goal: tuple[float, float]) -> None:
    found = compass_search(lambda p: (p[0] - goal[0]) ** 2 + 3 * (p[1] - goal[1]) ** 2, (0.0, 0.0))
    assert found == pytest.approx(goal, abs=0.05)
