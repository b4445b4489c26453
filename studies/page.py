"""docs/paper.md: the paper's statements beside our verdicts and figures.

Invariant: the page follows from the studies' declarations and from `docs/paper/NAME.json` (a run's verdict.json)
alone; a study without one says "not run". Nobody writes a figure into the page by hand.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from common.errors import UserError
from studies import STUDIES, find_study
from studies.report import FIGURE, VERDICT, findings_table
from studies.study import Study, markdown_row

PAGE, FOLDER = "paper.md", "paper"
_HEAD = """# The paper's experiments

"Understanding R1-Zero-Like Training: A Critical Perspective" (arXiv 2503.20783), each finding one command:

    slipstream study NAME            # miniature: MiniMath and tiny models, minutes on two cores
    slipstream study NAME --full     # the paper's models and sets, on GPUs
    slipstream study list

Rows, report and figure are in `studies/out/NAME/`; an interrupted study goes on where it was. `--seeds N` repeats
more often. Every study states its expectations with a number before it runs. A claim is *confirmed* if the 95 %
interval of its mean (Student's t over the repetitions) lies wholly on the expected side of the number, *not confirmed*
if wholly on the other, *unclear* otherwise. There is no interval, and the claim is unclear, with fewer than three
repetitions, and with fewer than six that all gave the same value, because such values do not tell how far others may
lie. Where the values are all there are, and no sample, the mean alone decides. Ten studies have some fifty claims: of
intervals of 95 %, one in twenty misses. A study is confirmed if all its claims are, and not confirmed if one is
refuted.

What a miniature shows, it shows of the miniature. In the studies that train (`dr-grpo` and below) a repetition is
another seed of questions and sampling from the same base model (in `countdown` from another): the intervals say nothing
about other base models or other held-out questions. In the studies that only sample (`templates`, `exploration`, `reflection`) it is another
pretraining, measured on the same questions. *After the run* says what was tried and the probable reason where a
miniature did not confirm. Base models are made first, one to two minutes of one core each, and kept in `studies/out/zoo`
for all studies (those of the miniatures below computed in bfloat16, today's in float32); the minutes below are without. Minutes are of one core, an upper bound where others used the machine.
In the figures lines are means over seeds, bands one standard deviation, whiskers the range over seeds.

With `--full` the protocol is the paper's: 500 questions of MATH's training set to probe with, 100 of each level (the
first ones, not the paper's own list); the verifier's level `full` for the analyses, where a response that was cut counts
if its answer is right; in `leaderboard` each base model under its best template before, the run's last evaluation after.
A hub model is one model: `templates`, `exploration` and `reflection` analyse it once, so that a claim whose repetitions
are models stays unclear there, whatever was measured.

With `--full`, `templates`, `exploration` and `reflection` also analyse a model behind an OpenAI-compatible server:
`--endpoint URL --endpoint-model NAME`; `slipstream serve` writes what starts one on several nodes. The judge is a set
of rules unless `--judge URL` names a server with a judge model.

This page is written by `slipstream study NAME --publish docs`.
"""


def publish(results: Path, docs: Path) -> None:
    """Take a study's verdict and figure into the documentation and write the page again.

    Raises:
        UserError: `docs` is no folder, or the results are not there.
    """
    if not docs.is_dir():
        raise UserError(f"'{docs}' is no folder", setting="--publish")
    summary = json.loads((results / VERDICT).read_text(encoding="utf-8"))
    (docs / FOLDER).mkdir(exist_ok=True)
    name = results.name
    (docs / FOLDER / f"{name}.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(results / FIGURE, docs / FOLDER / f"{name}.png")
    write(docs)


def write(docs: Path) -> None:
    """Write the page from what `docs/paper` holds."""
    (docs / PAGE).write_text(text(docs), encoding="utf-8")


def text(docs: Path) -> str:
    """The page."""
    studies = [find_study(name) for name in STUDIES]
    sections = "\n".join(_section(study, docs) for study in studies)
    return f"{_HEAD}\n{_overview(studies, docs)}\n{sections}"


def _verdict(name: str, docs: Path) -> dict[str, Any] | None:
    path = docs / FOLDER / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _overview(studies: list[Study], docs: Path) -> str:
    lines = [markdown_row(("study", "reproduces", "miniature", "full size")), "|---|---|---|---|"]
    for study in studies:
        outcomes = [(_verdict(name, docs) or {}).get("outcome", "not run") for name in _names(study)]
        lines.append(markdown_row((f"[{study.name}](#{study.name})", study.shows, *outcomes)))
    return "\n".join(lines) + "\n"


def _names(study: Study) -> tuple[str, str]:
    return study.name, f"{study.name}-full"


def _section(study: Study, docs: Path) -> str:
    parts = [f"## {study.name}\n", f"{study.shows}.\n", f"**The paper.** {study.paper}\n"]
    parts.append(f"**The miniature.** {study.miniature}\n")
    found = [(name, _verdict(name, docs)) for name in _names(study)]
    if not any(verdict for _, verdict in found):
        claims = (f"- {e.claim}: {e.side} {e.bound:g}" for e in study.expectations)
        parts.append("**Not run.** Expected:\n\n" + "\n".join(claims) + "\n")
    for name, verdict in found:
        if verdict is not None:
            seeds = f"seeds {', '.join(map(str, verdict['seeds']))}"
            parts.append(
                f"**{verdict['outcome'].capitalize()}** ({verdict['budget']}, {seeds}, {verdict['minutes']} minutes of computing).\n"
            )
            parts.append(findings_table(verdict["findings"]))
            parts.append(f"![{name}]({FOLDER}/{name}.png)\n")
    if study.remark and _verdict(study.name, docs):
        parts.append(f"**After the run.** {study.remark}\n")
    return "\n".join(parts)
