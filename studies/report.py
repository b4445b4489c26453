"""What a study leaves behind: report.md, verdict.json, figure.png, and the same in MLflow.

Invariant: everything is made from the rows; writing it again from the same rows gives the same files.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.tracking.shipper import tracking_uri
from studies.figures import save
from studies.study import Setting, Study, markdown_row
from studies.verdict import Finding, Row, Verdict

REPORT, VERDICT, FIGURE = "report.md", "verdict.json", "figure.png"
EXPERIMENT = "slipstream-studies"
log = logging.getLogger("slipstream.studies")


def write(study: Study, setting: Setting, rows: Sequence[Row], seconds: float) -> Verdict:
    """Write the three files into the study's folder."""
    verdict = study.judge(rows, full=setting.full)
    summary = {
        "study": study.name,
        "budget": str(setting.budget),
        "seeds": sorted({row["seed"] for row in rows if "seed" in row}),
        "minutes": round(seconds / 60, 2),
        "outcome": str(verdict.outcome),
        "findings": [finding.as_json() for finding in verdict.findings],
    }
    (setting.out / VERDICT).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (setting.out / REPORT).write_text(_markdown(study, setting, rows, summary), encoding="utf-8")
    save(lambda figure: study.draw(rows, figure), setting.out / FIGURE, f"{study.name} ({setting.budget})")
    return verdict


def findings_table(findings: Sequence[Mapping[str, Any]]) -> str:
    """The findings of a verdict.json as a Markdown table."""
    lines = ["| expectation | expected | measured (95 % interval) | repetitions | verdict |"]
    lines.append("|---|---|---|---|---|")
    for finding in findings:
        measured = _measured(finding)
        unit = finding["unit"].removesuffix("s") if finding["repetitions"] == 1 else finding["unit"]
        repetitions = f"{finding['repetitions']} {unit}"
        cells = (finding["claim"], finding["expected"], measured, repetitions, f"**{finding['outcome']}**")
        lines.append(markdown_row(cells))
    return "\n".join(lines) + "\n"


def screen_row(finding: Finding) -> tuple[str, ...]:
    """A finding for the terminal's table."""
    plain = finding.as_json()
    return plain["claim"], plain["expected"], _measured(plain), plain["outcome"]


def _measured(finding: Mapping[str, Any]) -> str:
    """Mean and interval; the mean alone where there is no interval."""
    if finding["mean"] is None:
        return "not measured"
    mean = f"{finding['mean']:.3g}"
    if finding["interval"] is None:
        return mean
    low, high = finding["interval"]
    return f"{mean} ({low:.3g} to {high:.3g})"


def _markdown(study: Study, setting: Setting, rows: Sequence[Row], summary: Mapping[str, Any]) -> str:
    tables = "\n".join(table.markdown() for table in study.tables(rows))
    seeds = ", ".join(map(str, summary["seeds"]))
    return (
        f"# {study.name}: {summary['outcome']}\n\n"
        f"Reproduces {study.shows} (arXiv 2503.20783). Budget: {setting.budget}. Seeds: {seeds}. "
        f"Computing time: {summary['minutes']} minutes.\n\n"
        f"The paper: {study.paper}\n\nHere: {study.miniature}\n\n"
        f"{findings_table(summary['findings'])}\n{tables}\n![figure]({FIGURE})\n"
    )


def upload(study: Study, setting: Setting, verdict: Verdict) -> None:
    """Send figure, report, rows and findings to MLflow; a store that is away is a warning, not an error."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or tracking_uri(None, Path("runs"))
    try:
        _upload(uri, study, setting, verdict)
    except Exception as error:  # whatever the store raises; the files are on disk
        log.warning("MLflow at %s did not take the study's results: %s", uri, error)


def _upload(uri: str, study: Study, setting: Setting, verdict: Verdict) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(EXPERIMENT)
    place = (
        (Path("runs").resolve() / "mlartifacts" / EXPERIMENT).as_uri() if uri.startswith("sqlite") else None
    )
    experiment = (
        found.experiment_id if found else client.create_experiment(EXPERIMENT, artifact_location=place)
    )
    run = client.create_run(experiment, run_name=study.name).info.run_id
    client.set_tag(run, "outcome", str(verdict.outcome))
    client.log_param(run, "budget", str(setting.budget))
    client.log_param(
        run, "seeds", str(json.loads((setting.out / VERDICT).read_text(encoding="utf-8"))["seeds"])
    )
    for number, finding in enumerate(verdict.findings):
        client.log_param(run, f"expectation_{number}", finding.expectation.claim)
        if finding.mean is not None:
            client.log_metric(run, f"expectation_{number}", finding.mean)
    for path in sorted(path for path in setting.out.iterdir() if path.is_file()):
        client.log_artifact(run, str(path))
    client.set_terminated(run)
