"""Finished units are kept, half units are not, and other settings are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import studies.runner as runner
from common.errors import UserError
from studies.store import RowStore
from studies.study import Budget, Setting, Study, Table, Unit, markdown_row
from studies.verdict import Expectation, Outcome


class Counting(Study):
    """Writes down which units it carried out; the third one fails once."""

    name = "counting"
    shows = paper = miniature = "nothing"
    expectations = (Expectation("c", lambda rows: [row["value"] for row in rows], 0.0),)
    done: list[str] = []  # noqa: RUF012 - a test double
    fails = False

    def units(self, setting: Setting) -> list[Unit]:
        return [Unit(f"u{seed}", {"seed": seed}) for seed in setting.seeds]

    def run(self, unit: Unit, setting: Setting) -> list[dict]:
        if unit.key == "u2" and Counting.fails:
            raise RuntimeError("power cut")
        Counting.done.append(unit.key)
        return [{"seed": unit.arguments["seed"], "value": 1.0 + unit.arguments["seed"] / 9}]

    def tables(self, rows) -> list[Table]:
        return [Table("t", [("a", "b"), ("x|y", str(len(rows)))])]

    def draw(self, rows, figure) -> None:
        figure.subplots()


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    Counting.done, Counting.fails = [], False
    monkeypatch.setattr(runner, "find_study", lambda name: Counting())
    return Counting()


def setting(folder: Path, seeds: int = 3, **changes) -> Setting:
    return Setting(
        **{"budget": Budget.SECONDS, "seeds": tuple(range(seeds))} | changes, out=folder, zoo=folder
    )


def test_an_interrupted_study_goes_on(tmp_path: Path, counting: Counting) -> None:
    Counting.fails = True
    with pytest.raises(RuntimeError):
        runner.run_study(counting, setting(tmp_path))
    Counting.fails = False
    verdict = runner.run_study(counting, setting(tmp_path))
    assert Counting.done == ["u0", "u1", "u2"]
    assert verdict.findings[0].repetitions == 3
    assert verdict.outcome is Outcome.CONFIRMED
    runner.run_study(counting, setting(tmp_path, seeds=4))  # more seeds only add
    assert Counting.done[3:] == ["u3"]


def test_rows_are_judged_again_without_base_models(
    tmp_path: Path, counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner.run_study(counting, setting(tmp_path))
    monkeypatch.setattr(Counting, "models", lambda *_: pytest.fail("a base model was asked for"))
    assert runner.run_study(counting, setting(tmp_path)).outcome is Outcome.CONFIRMED


def test_fresh_begins_again(tmp_path: Path, counting: Counting) -> None:
    runner.run_study(counting, setting(tmp_path))
    runner.run_study(counting, setting(tmp_path), fresh=True)
    assert Counting.done == ["u0", "u1", "u2"] * 2


def test_other_settings_are_refused(tmp_path: Path, counting: Counting) -> None:
    runner.run_study(counting, setting(tmp_path))
    with pytest.raises(UserError, match=r"^--out: .*budget"):
        runner.run_study(counting, setting(tmp_path, budget=Budget.MINIATURE))


@given(cut=st.integers(0, 400))
def test_a_file_cut_anywhere_holds_whole_units_only(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("store")
    store = RowStore(folder, {})
    for unit in ("a", "b", "c"):
        store.add(unit, [{"value": number} for number in range(3)], 1.0)
    path = folder / "rows.jsonl"
    path.write_bytes(path.read_bytes()[:cut])
    again = RowStore(folder, {})
    for unit in ("a", "b", "c"):
        kept = [row["value"] for row in again.rows if row["unit"] == unit]
        assert kept == ([0, 1, 2] if again.has(unit) else [])
    again.add("d", [{"value": 7}], 1.0)
    assert RowStore(folder, {}).rows[-1] == {"unit": "d", "value": 7}


def test_a_bar_does_not_break_a_markdown_row() -> None:
    assert markdown_row(("|x|", "y")) == "| \\|x\\| | y |"
