"""docs/paper.md is what its sources say, and every study is on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.errors import UserError
from studies import STUDIES, page
from studies.length_bias import LengthBias
from studies.report import FIGURE, VERDICT

DOCS = Path(__file__).parents[2] / "docs"


def test_page_is_up_to_date() -> None:
    assert (DOCS / page.PAGE).read_text(encoding="utf-8") == page.text(DOCS)


def test_figures_stay_small() -> None:
    figures = list((DOCS / page.FOLDER).glob("*.png"))
    assert figures
    assert all(figure.stat().st_size < 150_000 for figure in figures)


def test_what_was_tried_follows_the_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A remark belongs to a run: without one there is nothing to remark on."""
    monkeypatch.setattr(LengthBias, "remark", "Tried twice.")
    assert "Tried twice." not in page.text(tmp_path)
    verdict = {"budget": "miniature", "seeds": [0], "minutes": 0.1, "outcome": "unclear", "findings": []}
    (tmp_path / page.FOLDER).mkdir()
    (tmp_path / page.FOLDER / "length-bias.json").write_text(json.dumps(verdict))
    written = page.text(tmp_path)
    assert written.index("**Unclear** (miniature") < written.index("**After the run.** Tried twice.")


def test_a_study_without_a_verdict_is_not_run(tmp_path: Path) -> None:
    written = page.text(tmp_path)
    assert written.count("**Not run.**") == len(STUDIES)
    assert all(f"## {name}\n" in written for name in STUDIES)


def test_publishing_takes_verdict_and_figure(tmp_path: Path) -> None:
    results, docs = tmp_path / "length-bias", tmp_path / "docs"
    results.mkdir()
    docs.mkdir()
    findings = [finding.as_json() for finding in LengthBias().judge([{"kind": "none"}]).findings]
    summary = {
        "budget": "miniature",
        "seeds": [0],
        "minutes": 0.1,
        "outcome": "unclear",
        "findings": findings,
    }
    (results / VERDICT).write_text(json.dumps(summary))
    (results / FIGURE).write_bytes(b"png")
    page.publish(results, docs)
    written = (docs / page.PAGE).read_text()
    assert written == page.text(docs)
    assert "**Unclear** (miniature, seeds 0" in written
    assert (docs / "paper" / "length-bias.png").read_bytes() == b"png"


def test_a_wrong_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--publish: "):
        page.publish(tmp_path, tmp_path / "nowhere")
