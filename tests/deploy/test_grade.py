"""`slipstream grade`: one line out per line in, whatever it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from common.errors import UserError
from deploy.grade import grade, grade_file, summary

app = typer.Typer()
app.command()(grade)


def _line(response: object, gold: object, **more: object) -> bytes:
    return json.dumps({"response": response, "gold": gold, **more}).encode()


LINES: list[tuple[bytes, str, str]] = [
    (_line(r"\boxed{1/2}", "0.5", id="a"), "correct", ""),
    (_line(r"\boxed{3}", 4), "wrong", ""),
    (_line("no answer here", "5"), "unformatted", "no answer"),
    (b"junk", "invalid", "not JSON"),
    (b"", "invalid", "empty line"),
    (b"[1, 2]", "invalid", "not a JSON object"),
    (b'{"response": "x"}', "invalid", "'gold'"),
    (b'{"gold": "x"}', "invalid", "'response'"),
    (_line(7, "7"), "invalid", "not a string"),
    (_line(r"\boxed{7}", {"a": 1}), "invalid", "gold"),
    (_line(r"\boxed{7}", None), "invalid", "gold"),
    (_line(r"\boxed{7}", [7.0, "x"], verdict="invalid", reason="of an earlier run"), "correct", "earlier"),
    (b'{"response": "\xff\xfe", "gold": "1"}', "invalid", "not UTF-8"),
    (b'{"response": "\\\\boxed{7}\\ud800", "gold": "7"}', "correct", ""),
    (_line("a\x00b \\boxed{7}", "7"), "correct", ""),
    (_line("\\boxed{" + "x" * 10**6 + "}", "7"), "wrong", ""),
    (_line("\\boxed{" * 150_000, "7"), "unformatted", "not closed"),
    (_line("\\boxed{1}, " * 90_000, "7"), "wrong", ""),
    (_line("$" * 10**6, "7"), "unformatted", ""),
    (_line(r"\boxed{9^{9^{9^9}}}", r"\sqrt2"), "wrong", ""),
    (b"[" * 100_000, "invalid", "nested too deeply"),
    (b'{"gold": ' + b"[" * 500 + b"]" * 500 + b', "response": "\\\\boxed{7}"}', "invalid", "nested too deeply"),
    (_line(r"\boxed{7}", "7"), "correct", ""),
]  # fmt: skip


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_line_gets_a_verdict_in_its_place(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\n".join(line for line, _, _ in LINES))
    counts = grade_file(str(source), str(target), workers=1)
    records = _read(target)
    assert [r["verdict"] for r in records] == [verdict for _, verdict, _ in LINES]
    for record, (line, _, reason) in zip(records, LINES, strict=True):
        assert reason in record.get("reason", "")
        assert {"extracted", "seconds"} <= set(record)
        if record["verdict"] != "invalid":
            assert record["response"] == json.loads(line)["response"]
    assert records[0]["id"] == "a"
    assert records[0]["extracted"] == "1/2"
    assert counts.total() == len(LINES)


def test_command_reads_standard_input_and_prints_a_summary_on_standard_error() -> None:
    result = CliRunner().invoke(
        app, ["-", "--level", "fast", "--workers", "1"], input=_line(r"\boxed{2}", "2") + b"\nx\n"
    )
    assert result.exit_code == 0
    assert [json.loads(line)["verdict"] for line in result.stdout.splitlines()] == ["correct", "invalid"]
    assert "2 lines: 1 correct (50.0%), 1 invalid (50.0%)" in result.stderr


def test_options_change_what_counts(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(
        b"\n".join([_line("</think> <answer>5</answer>", "5"), _line(r"\boxed{1,2}", "(1,2)")])
    )

    def verdicts(**options: str) -> list[str]:
        grade_file(str(source), str(target), workers=1, **options)  # type: ignore[arg-type]
        return [r["verdict"] for r in _read(target)]

    assert verdicts(template="answer_tag") == ["correct", "unformatted"]
    assert verdicts(template="boxed", level="full") == ["unformatted", "correct"]
    assert verdicts(template="boxed", level="fast") == ["unformatted", "wrong"]
    assert verdicts(template="auto", level="full") == ["correct", "correct"]


def test_mistakes_of_the_caller_are_one_sentence(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(_line("x", "1"))
    with pytest.raises(UserError, match="cannot read"):
        grade_file(str(tmp_path / "missing.jsonl"))
    with pytest.raises(UserError, match="cannot write"):
        grade_file(str(source), str(tmp_path / "no" / "folder.jsonl"))
    with pytest.raises(UserError, match="input file"):
        grade_file(str(source), str(source))
    with pytest.raises(UserError, match="fast, full"):
        grade_file(str(source), level="best")
    assert source.read_bytes() == _line("x", "1")


def test_an_empty_file(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"")
    assert summary(grade_file(str(source), str(target), workers=1)) == "no lines"
    assert target.read_text() == ""
