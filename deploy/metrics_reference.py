"""docs/metrics.md, from the one table of metrics in `common.tracking.catalogue`.

`python -m deploy.metrics_reference` writes it; a test keeps it in step.
"""

from __future__ import annotations

from common.recipe.load import REPOSITORY
from common.tracking.catalogue import BUCKETS, GROUPS, TABLE

PAGE = REPOSITORY / "docs" / "metrics.md"
HEAD = f"""\
# Metrics

<!-- written by `python -m deploy.metrics_reference` from common/tracking/catalogue.py -->

A run writes every point to `metrics.jsonl` in its folder, one JSON object per line: `time`, `kind`, `step`, `values`. MLflow
gets the same points under the name `KIND/NAME`, on a page with one section per kind ([operating.md](operating.md), Watching);
the broker's Prometheus page has the newest of them as `slipstream_KIND{{name="NAME"}}` for `actor`, `learner` and `eval`. A run emits
no metric that is not in this list.

The step of a metric is the policy iteration (one batch, one weight push), from 0; that of `eval/` is the version that answered: the
number of steps trained before. After a rewind (a learner that went back to a checkpoint) a step may occur twice; the later
point counts. A figure that has nothing to be measured on is left out, never 0.

μ is the policy that sampled a token (the behaviour policy), π the one that trains. Staleness is the number of versions between
them; its buckets are {", ".join(BUCKETS)}. An empty unit is a pure number.

MLflow draws one chart section per part before the last slash, so that `learner/by_staleness/`, `eval/SET/` and
`system/PEER/` are sections of their own.
"""


def page() -> str:
    """The whole page."""
    lines, escaped = [HEAD], r"\|"
    for group, what in GROUPS.items():
        lines += [f"## {group}", "", what, "", "| metric | unit | what |", "|---|---|---|"]
        lines += [
            f"| `{entry.full_name}` | {entry.unit} | {entry.what.replace('|', escaped)} |"
            for entry in TABLE
            if entry.group == group
        ]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Rewrite the page."""
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
