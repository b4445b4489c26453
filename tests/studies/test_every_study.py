"""Every study from end to end on a budget of seconds: real models, rows, report, figure, a verdict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.recipe import load_recipe
from studies import STUDIES, find_study
from studies.runner import run_study
from studies.study import Budget, Setting
from studies.verdict import Outcome

TRAINED = ("dr-grpo", "duet", "pretraining", "leaderboard", "staleness", "countdown")


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


@pytest.mark.parametrize("name", TRAINED)
def test_every_full_size_run_resolves(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every unit of `--full` starts a shipped recipe with settings that the recipe takes."""
    started: set[str] = set()

    def resolve(recipe: str, run: str, root: Path, settings: dict) -> list:
        loaded = load_recipe(recipe, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
        assert loaded.run.seed == settings["run.seed"]
        assert run not in started
        started.add(run)
        return []

    monkeypatch.setattr("studies.curves.run_recipe", resolve)
    monkeypatch.setattr("studies.staleness.run_recipe", resolve)
    monkeypatch.setattr("studies.leaderboard._base_rows", lambda size: started.add(size) or [])
    study, setting = find_study(name), Setting(Budget.FULL, (3,), tmp_path, tmp_path)
    units = study.units(setting)
    assert all(study.run(unit, setting) == [] for unit in units)
    assert len(started) == len(units)
