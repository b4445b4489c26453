"""The tabular policy, the drawn weights, and the study from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from studies import tabular
from studies.length_bias import LengthBias
from studies.runner import run_study
from studies.study import Budget, Setting
from studies.verdict import Outcome


def rollout(seed: int = 0, questions: int = 40) -> tuple[tabular.TabularPolicy, tabular.Rollout]:
    policy = tabular.TabularPolicy(questions)
    return policy, policy.sample(torch.Generator().manual_seed(seed))


def test_sampled_lengths_have_the_probabilities_that_logp_says() -> None:
    """Mean of exp(-log π) over responses of n tokens and one method is 1 / P(n): compare with counts."""
    policy, sample = rollout(questions=2000)
    logp, sequence = policy.logp(sample)
    stop = torch.zeros(len(sample.lengths)).index_add(0, sequence, logp.detach())
    method = torch.nn.functional.logsigmoid(
        torch.where(sample.right, 1.0, -1.0) * policy.method.detach().repeat_interleave(tabular.GROUP)
    )
    for length in (2, 3, 6):
        chosen = sample.lengths == length
        said = float((stop - method)[chosen].mean().exp())
        assert said == pytest.approx(0.2 * 0.8 ** (length - 2), rel=1e-4)
        assert float(chosen.double().mean()) == pytest.approx(said, abs=4 * (said / len(chosen)) ** 0.5)


def test_a_response_cut_at_the_budget_earns_nothing() -> None:
    policy = tabular.TabularPolicy(50, stop=0.01)
    sample = policy.sample(torch.Generator().manual_seed(1))
    cut = ~sample.finished
    assert cut.any()
    assert set(sample.lengths[cut].tolist()) == {tabular.BUDGET}
    assert not sample.rewards.flatten()[cut].any()


@pytest.mark.parametrize(("algorithm", "equal"), [("dr_grpo", True), ("grpo", False)])
def test_weight_of_a_wrong_token_falls_with_length_under_grpo_only(algorithm: str, equal: bool) -> None:
    study, where = LengthBias(), setting(Path())
    rows = study.run(study.units(where)[1], where)
    wrong = [r for r in rows if r["algorithm"] == algorithm and r["question"] == 0 and not r["right"]]
    by_length = {row["length"]: abs(row["token"]) for row in wrong}
    shortest, longest = by_length[min(by_length)], by_length[max(by_length)]
    assert (shortest == pytest.approx(longest)) is equal
    if not equal:
        assert shortest / longest == pytest.approx(max(by_length) / min(by_length))


def setting(out: Path, seeds: int = 3) -> Setting:
    return Setting(Budget.SECONDS, tuple(range(seeds)), out / "study", out / "zoo")


def test_study_from_end_to_end(tmp_path: Path) -> None:
    verdict = run_study(LengthBias(), setting(tmp_path))
    folder = tmp_path / "study"
    summary = json.loads((folder / "verdict.json").read_text())
    assert summary["outcome"] == str(verdict.outcome)
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "Table 2" in (folder / "report.md").read_text()
    audit = [finding for finding in verdict.findings if finding.expectation.unit == "frameworks"]
    assert audit[0].outcome is Outcome.CONFIRMED


def test_expectations_fail_on_rows_without_a_bias() -> None:
    """Every objective gives the same curve but for noise: the claims about length must be refuted."""
    rows = [
        {
            "kind": "curve",
            "algorithm": algorithm,
            "seed": seed,
            "step": step,
            "reward": 0.9 + noise * seed / 1000,
            "length": 5.0,
            "length_correct": 4.0 + noise * seed / 10,
            "length_incorrect": 6.0 + noise * seed / 10,
        }
        for noise, algorithm in enumerate(("grpo", "dr_grpo", "wo_len", "wo_std"))
        for seed in range(3)
        for step in range(3)
    ]
    outcomes = {
        f.expectation.claim: f.outcome
        for f in LengthBias().judge(rows).findings
        if f.expectation.unit == "seeds"
    }
    assert outcomes["reward at the end, |GRPO - Dr. GRPO|"] is Outcome.CONFIRMED
    about_length = [outcome for claim, outcome in outcomes.items() if claim.startswith("length")]
    assert about_length == [Outcome.NOT_CONFIRMED] * 3


@pytest.mark.nightly  # two processes import torch
def test_rows_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    rows = []
    for jobs in (1, 2):
        where = setting(tmp_path / str(jobs), seeds=1)
        run_study(LengthBias(), where, jobs=jobs)
        lines = (where.out / "rows.jsonl").read_text().splitlines()
        rows.append(sorted(line for line in lines if "_unit_seconds" not in line))
    assert rows[0] == rows[1]
