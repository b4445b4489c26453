"""`slipstream plan`: what it shares out, what it says about its rates, what it refuses in one sentence."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from common.errors import UserError
from common.recipe import load_recipe
from deploy.cli import VERBS
from deploy.planning.assumed import Given, a100_rates, sources
from deploy.planning.recommend import CLOSE, Split, actors_for_learner, best, best_of_gpus, candidates
from deploy.planning.simulate import Outcome
from deploy.planning.workload import LogNormal, Workload

PARAMETERS = 7.6e9
WORKLOAD = Workload(LogNormal(200, 1000), prompt_tokens=100)


def outcome(step_s: float) -> Outcome:
    return Outcome(step_s, 0.0, 0.0, 0.0, {0: 1.0}, 1.0, 1.0, [], {})


def run(*arguments: str) -> Any:
    import typer

    from deploy.plan import plan

    app = typer.Typer()
    app.command()(plan)
    return CliRunner().invoke(app, list(arguments), catch_exceptions=True)


def small(*overrides: str) -> Any:
    return load_recipe(
        "paper-7b",
        ["batch.questions_per_step=16", "run.steps=6", "rollout.max_tokens=1000", *overrides],
    )


def rates_of(ranks: int, gpus: int = 8) -> Any:
    return a100_rates(
        PARAMETERS, slots=256, tensor_parallel=1, ranks=ranks, updates=8, gpus=gpus, given=Given()
    )


def test_the_fastest_wins_and_among_equals_the_smallest() -> None:
    splits = [
        Split(4, 4, 8, outcome(10.0)),
        Split(2, 4, 6, outcome(10.0 * (1 + CLOSE / 2))),
        Split(1, 1, 2, outcome(20.0)),
    ]
    assert best(splits).gpus == 6


def test_candidates_hold_at_least_what_fits_and_at_most_the_gpus() -> None:
    for gpus in (2, 8, 64, 512):
        ways = candidates(small(), rates_of(1), WORKLOAD, gpus, fewest_ranks=2)
        assert all(ranks >= 2 and actors >= 1 and ranks + actors <= gpus for ranks, actors in ways)
        assert bool(ways) == (gpus > 2)


def test_a_split_of_eight_gpus() -> None:
    split = best_of_gpus(small(), rates_of, WORKLOAD, 8, fewest_ranks=2)
    assert split is not None
    assert split.ranks >= 2
    assert split.gpus == split.ranks + split.actors <= 8
    assert split.hours(3600) == pytest.approx(split.outcome.step_s)
    assert best_of_gpus(small(), rates_of, WORKLOAD, 2, fewest_ranks=2) is None


def test_a_small_batch_leaves_gpus_over() -> None:
    split = best_of_gpus(small("batch.questions_per_step=8"), rates_of, WORKLOAD, 256)
    assert split is not None
    assert split.gpus < 64


def test_more_actors_for_a_learner() -> None:
    found = actors_for_learner(small(), rates_of(4), WORKLOAD, [1, 2, 4], seed=0)
    assert [split.actors for split in found] == [1, 2, 4]
    assert found[0].outcome.step_s > found[2].outcome.step_s


def test_given_rates_replace_assumed_ones() -> None:
    given = Given(actor_rate=1000, decode_ms=20, learner_rate=500, update_seconds=1, push_seconds=3)
    rates = a100_rates(PARAMETERS, slots=100, tensor_parallel=1, ranks=2, updates=4, gpus=8, given=given)
    assert rates.actor_rate(100) == pytest.approx(1000)
    assert rates.decode_s == pytest.approx(0.02)
    assert rates.learner_rate == pytest.approx(1000)
    assert (rates.train_fixed_s, rates.push_s) == (4, 3)
    assert sources(PARAMETERS, 100, given) == []
    assert len(sources(PARAMETERS, 100, Given())) == 5


def test_the_verb_is_registered() -> None:
    assert VERBS["plan"][:2] == ("deploy.plan", "plan")


def test_json_has_a_row_for_each_number_of_gpus() -> None:
    options = ["--set", "batch.questions_per_step=8", "--set", "run.steps=4", "--gpus", "8", "--gpus", "16"]
    done = run("paper-7b", *options, "--mean-length", "100", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert [row["name"] for row in found["rows"]] == ["8 A100s", "16 A100s"]
    assert all(0 <= row["learner_idle"] <= 1 and row["hours"] > 0 for row in found["rows"])
    assert all("assumed" in source for _, source in found["rates"])
    assert any("not measured" in note for note in found["notes"])


def test_what_fits_a_recorded_learner_is_not_recommended_for_a100s_even_where_every_rate_is_given() -> None:
    options = [
        "--set",
        "batch.questions_per_step=8",
        "--set",
        "run.steps=4",
        "--gpus",
        "8",
        "--mean-length",
        "100",
    ]
    rates = {"actor-rate": 1000, "decode-ms": 20, "learner-rate": 500, "update-seconds": 1, "push-seconds": 3}
    done = run(
        "paper-7b", *options, *(word for name, rate in rates.items() for word in (f"--{name}", str(rate)))
    )
    assert (done.exit_code, "actor-rate 1000 (given)" in done.output) == (0, True), done.output
    assert "recommended" not in done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-recipe"], "no-such-recipe"),
        (["demo", "--from", "nowhere"], "nowhere"),
        (["paper-7b", "--actor-rate", "-1"], "--actor-rate"),
        (["paper-7b", "--push-seconds", "0"], "--push-seconds"),
        (["paper-7b", "--actor-rate", "1e9"], "--actor-rate"),
        (["demo", "--from", "x", "--mean-length", "5"], "--mean-length"),
        (["demo", "--from", "x", "--gpus", "8"], "--gpus"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], words: str) -> None:
    error = run(*arguments).exception
    assert isinstance(error, UserError)
    assert words in str(error)
    assert "\n" not in str(error).strip()
