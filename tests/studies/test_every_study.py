"""Every study from end to end on a budget of seconds: real models, rows, report, figure, a verdict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.recipe import find_recipe
from studies import STUDIES, find_study
from studies.runner import run_study
from studies.study import Budget, Setting
from studies.verdict import Outcome


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo")


@pytest.mark.parametrize("name", [name for name in STUDIES if name != "length-bias"])
def test_study_from_end_to_end(name: str, tmp_path: Path, zoo: Path) -> None:
    """One seed cannot confirm anything, whatever it measures; a study of questions may still refute a claim."""
    study = find_study(name)
    setting = Setting(Budget.SECONDS, (0,), tmp_path / name, zoo)
    done: list[str] = []
    verdict = run_study(study, setting, progress=lambda what, number, total: done.append(f"{number}/{total}"))
    assert done[-1].split("/")[0] == done[-1].split("/")[1]
    assert verdict.outcome is not Outcome.CONFIRMED
    assert len(verdict.findings) == len(study.expectations)
    summary = json.loads((tmp_path / name / "verdict.json").read_text())
    assert summary["study"] == name
    assert (tmp_path / name / "figure.png").stat().st_size > 5000
    report = (tmp_path / name / "report.md").read_text()
    assert all(finding.expectation.claim.replace("|", "\\|") in report for finding in verdict.findings)


@pytest.mark.parametrize("name", list(STUDIES))
def test_full_size_has_units_of_known_recipes(name: str, tmp_path: Path) -> None:
    """`--full` names recipes that exist, and units that are all different."""
    study = find_study(name)
    units = study.units(Setting(Budget.FULL, (0, 1), tmp_path, tmp_path))
    assert len({unit.key for unit in units}) == len(units) > 0
    assert study.default_seeds >= 3 or name == "length-bias"


def test_recipes_of_full_size_runs_exist() -> None:
    from studies import countdown, dr_grpo, duet, leaderboard

    names = [*dr_grpo.RECIPES.values(), *leaderboard.RECIPES.values(), countdown.RECIPE, "paper-1.5b-qwen"]
    names += [f"duet-{duet._SHORT.get(t, t)}-{s}" for t in duet.TEMPLATES for s in duet.SETS]
    for name in names:
        assert find_recipe(name).is_file()
