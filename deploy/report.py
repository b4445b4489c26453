"""What remains of a run: summary.json and progress.png, from its points on disk.

Invariant: every figure comes from the spool (`metrics.jsonl`) and the broker's last status in it; a step that
was trained again after a rewind counts once, as it was trained last. What was not measured is absent or null.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.files import replace_json
from common.run_files import FIGURE_FILE, RECIPE_FILE, SPOOL, SUMMARY_FILE
from common.tracking.spool import Record, read_spool

Summary = dict[str, Any]
SAMPLED = ("accuracy", "format_share", "truncated", "unverified")  # of all that the actors published
STEPWISE = ("learner", "actor", "broker", "system")
WARM_UP_STEPS = 2  # compilers, caches and the first weight push: not counted in shares and rates
LENGTHS = (("length", "all"), ("length_correct", "correct"), ("length_incorrect", "incorrect"))


class Points:
    """The points of a run by kind and step; the last one written for a step counts."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._kinds: dict[str, dict[int, dict[str, Any]]] = {}
        for record in records:
            steps = self._kinds.setdefault(record.kind, {})
            if record.kind in STEPWISE:  # after a rewind, what came later is gone
                for later in [step for step in steps if step > record.step]:
                    del steps[later]
            steps[record.step] = record.values
        self.end = self._kinds.get("end", {})

    def series(self, kind: str, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric, in order, where it was measured."""
        rows = sorted(self._kinds.get(kind, {}).items())
        found = [(step, values[name]) for step, values in rows if values.get(name) is not None]
        return [step for step, _ in found], [value for _, value in found]

    def values(self, kind: str, name: str, *, after: int = 0) -> list[float]:
        """Values of one metric from step `after` on."""
        steps, values = self.series(kind, name)
        return [value for step, value in zip(steps, values, strict=True) if step >= after]


def read_points(folder: Path) -> Points:
    """The points of a run folder."""
    return Points(read_spool(folder / SPOOL))


def summarise(folder: Path, end: Mapping[str, Any]) -> Summary:
    """The summary of a run that has ended; `end` is its last point's values (`status`, `reason`, `final`)."""
    points, final = read_points(folder), end["final"]
    first, last = final.get("first_lease_time"), final.get("last_commit_time")
    seconds = last - first if first and last else None
    prepared = (folder / RECIPE_FILE).stat().st_mtime
    return {
        "run": final["run"],
        "status": end["status"],
        "reason": end["reason"],
        "steps": final["step"],
        "versions": final["version"],
        "seconds": seconds,
        "startup_seconds": first - prepared if first and not final.get("resumed") else None,
        **_accuracy(final["evaluations"]),
        "reward_last": _last(points.values("learner", "reward")),
        "learner_idle_share": _idle_share(points),
        "actor_tokens_per_s": _actor_rate(final, seconds),
        "learner_tokens_per_s": _mean(points.values("learner", "tokens_per_s", after=WARM_UP_STEPS)),
        "staleness_mean": final["staleness"]["mean"],
        "staleness_max": final["staleness"]["max"],
        "mismatch_max": max(points.values("learner", "mismatch_max"), default=None),
        "mismatch_mean": _mean(points.values("learner", "mismatch_mean")),
        "probe_mismatch_mean": _mean(points.values("actor", "weights_probe_mean")),
        **{f"sampled_{name}_last": _last(points.values("actor", name)) for name in SAMPLED},
        "ledger": final["ledger"],
    }


def _accuracy(history: Sequence[Mapping[str, Any]]) -> Summary:
    def of(entry: Mapping[str, Any] | None, key: str) -> float | None:
        return None if entry is None else entry.get(key)

    ordered = sorted(history, key=lambda entry: entry["version"])
    first, last = (ordered[0], ordered[-1]) if ordered else (None, None)
    return {
        "heldout_pass1_first": of(first, "pass1"),
        "heldout_pass1_last": of(last, "pass1"),
        "heldout_greedy_first": of(first, "greedy"),
        "heldout_greedy_last": of(last, "greedy"),
        "heldout_version_last": of(last, "version"),
    }


def _idle_share(points: Points) -> float | None:
    waiting = sum(points.values("learner", "seconds_waiting", after=WARM_UP_STEPS))
    names = ("waiting", "training", "publishing", "checkpointing")
    total = sum(sum(points.values("learner", f"seconds_{name}", after=WARM_UP_STEPS)) for name in names)
    return waiting / total if total else None


def _actor_rate(final: Mapping[str, Any], seconds: float | None) -> float | None:
    if final.get("resumed"):  # its peers were counted since the last start only, its seconds since the first
        return None
    tokens = sum(peer["tokens"] for peer in final["peers"].values() if peer["role"] == "actor")
    return tokens / seconds if seconds else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _last(values: Sequence[float]) -> float | None:
    return values[-1] if values else None


def write_summary(folder: Path, summary: Summary) -> Path:
    """Write summary.json, whole or not at all."""
    path = folder / SUMMARY_FILE
    replace_json(path, summary, indent=2)
    return path


def read_summary(folder: Path) -> Summary | None:
    """summary.json of a run, or None."""
    try:
        return json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def draw_progress(folder: Path, evaluations: Sequence[Mapping[str, Any]]) -> Path:
    """Draw progress.png: reward, held-out accuracy, response length, staleness."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = read_points(folder)
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), layout="constrained")
    _draw_reward(axes[0][0], points)
    _draw_accuracy(axes[0][1], evaluations)
    _draw_lengths(axes[1][0], points)
    _draw_staleness(axes[1][1], points)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Slipstream: {folder.name}")
    path = folder / FIGURE_FILE
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _draw_reward(axis: Any, points: Points) -> None:
    axis.plot(*points.series("learner", "reward"), color="tab:blue")
    axis.set(title="training reward (mean over all scheduled responses)", xlabel="step", ylim=(0, 1.02))


def _draw_accuracy(axis: Any, evaluations: Sequence[Mapping[str, Any]]) -> None:
    for key, label, colour in (
        ("pass1", "sampled, temperature 1", "tab:orange"),
        ("greedy", "greedy", "tab:green"),
    ):
        rows = sorted((e["version"], e[key]) for e in evaluations if e.get(key) is not None)
        if rows:
            axis.plot(*zip(*rows, strict=True), marker="o", markersize=3, label=label, color=colour)
            axis.legend(frameon=False, loc="lower right")
    axis.set(title="held-out accuracy (pass@1)", xlabel="version", ylim=(0, 1.02))


def _draw_lengths(axis: Any, points: Points) -> None:
    for name, label in LENGTHS:
        axis.plot(*points.series("actor", name), label=label)
    axis.legend(frameon=False)
    axis.set(title="response length of all that was sampled (tokens)", xlabel="step")


def _draw_staleness(axis: Any, points: Points) -> None:
    for name in ("mean", "max"):
        axis.plot(*points.series("learner", f"staleness_{name}"), label=name)
    axis.legend(frameon=False)
    axis.set(title="staleness of trained tokens (versions)", xlabel="step")
