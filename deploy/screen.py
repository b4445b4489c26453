"""One screen that says how a run goes, from the broker's status.

Invariant: a pure function of the status (keys in docs/operating.md); what is not known yet is a dash, never 0.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from broker.explain import explain

EVENTS_SHOWN = 3
PEERS_SHOWN = 24  # of a thousand: the rest is in --json
GONE_SHOWN = 3
BEHIND_SHOWN_S = 15.0
STEP_PARTS = ("waiting", "training", "publishing", "checkpointing")  # of a step's time, in the learner
DASH = "–"


def screen(
    status: Mapping[str, Any] | None, *, title: str, note: str = "", ended: str | None = None
) -> RenderableType:
    """The live display of a run.

    Args:
        status: None until the broker answers.
        title: of the frame.
        note: in place of a status, or below it.
        ended: how and when a run ended whose last status this is; nobody waits for anybody then.
    """
    named = Text(title)
    if status is None:
        return Panel(Text(note or "starting broker, actors and learner ..."), title=named, title_align="left")
    parts: list[RenderableType] = [_progress(status, ended), _figures(status), _peers(status)]
    parts += [Text(str(cause), style="yellow") for cause in (explain(status) if ended is None else ())]
    parts += [
        Text(_event(event), style="yellow" if event["warning"] else "dim")
        for event in status["events"][-EVENTS_SHOWN:]
    ]
    if note:
        parts.append(Text(note, style="bold"))
    parts += [Text(line, style="yellow") for line in tracker_behind(status)]
    return Panel(Group(*parts), title=named, title_align="left")


def _progress(status: Mapping[str, Any], ended: str | None) -> RenderableType:
    done, total = status["step"], status["steps_total"]
    row = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=max(1, total), completed=done, width=40)
    row.add_row(
        Text(f"step {done}/{total}", style="bold"),
        bar,
        f"version {status['version']}",
        ended or f"ETA {eta(status)}",
    )
    return row


def eta(status: Mapping[str, Any], now: float | None = None) -> str:
    """Time to the last step: at the mean pace so far; of a resumed run, which may have lain still, at the newest step's."""
    first, done = status.get("first_lease_time"), status["step"]
    left = status["steps_total"] - done
    if status["finished"] or left <= 0:
        return "done"
    if status.get("resumed"):
        train = status["train"] or {}
        pace = sum(train.get(f"seconds_{part}") or 0.0 for part in STEP_PARTS)
    else:
        pace = ((now or time.time()) - first) / done if first and done else 0.0
    if not pace:
        return DASH
    minutes, seconds = divmod(int(pace * left), 60)
    return f"{minutes}:{seconds:02d}"


def _figures(status: Mapping[str, Any]) -> RenderableType:
    train, staleness, queue = status["train"] or {}, status["staleness"], status["queue"]
    rollouts = status["rollouts"]
    table = Table.grid(padding=(0, 3))
    table.add_row("reward", number(train.get("reward"), ".3f"), "held-out", held_out(status))
    table.add_row(
        "tokens/s",
        f"actors {number(status['rates']['actor_tokens_per_s'], ',.0f')}, "
        f"learner {number(train.get('tokens_per_s'), ',.0f')}",
        "learner idle",
        f"{number(train.get('idle_share'), '.0%')}{bottleneck(train)}",
    )
    table.add_row(
        "staleness",
        f"mean {number(train.get('staleness_mean'), '.2f')}, max {staleness['max']} of {staleness['bound']}",
        "queue",
        f"{queue['untaken'] - status['leases']['count']} buffered, {status['leases']['count']} in flight, "
        f"{queue['wanted_per_step']} a step",
    )
    table.add_row(
        "length",
        f"{number(rollouts.get('length'), '.1f')} tokens "
        f"(correct {number(rollouts.get('length_correct'), '.1f')}, "
        f"incorrect {number(rollouts.get('length_incorrect'), '.1f')})",
        "mismatch",
        f"mean {number(rollouts.get('weights_probe_mean'), '.1e')} nats (probe), "
        f"{number(train.get('mismatch_mean'), '.1e')} (trained tokens)",
    )
    table.add_row(
        "weights", _push(status), "leases", f"oldest {number(status['leases']['oldest_s'], '.0f')} s"
    )
    return table


def _push(status: Mapping[str, Any]) -> str:
    """The newest weight push as its learner saw it."""
    meters: Mapping[str, Any] = next(
        (p["telemetry"] for p in status["peers"].values() if p["role"] == "learner" and p["alive"]), {}
    )
    parts = [
        f"{label} {format(meters[name], form)}{unit}"
        for label, name, form, unit in (
            ("sent in", "push_send_s", ".2f", " s"),
            ("engines stopped", "push_stopped_ms", ".0f", " ms"),
            ("furthest behind", "push_versions_behind", ".0f", ""),
            ("broken links", "push_failures", ".0f", ""),
        )
        if name in meters
    ]
    return ", ".join(parts) or DASH


def bottleneck(train: Mapping[str, Any]) -> str:
    """Says so when the learner waits for the actors."""
    share = train.get("idle_share")
    return "  (the actors are the bottleneck)" if share is not None and share > 0.15 else ""


def held_out(status: Mapping[str, Any]) -> str:
    """Accuracy of the first and the latest evaluation."""
    history = status["evaluations"]
    if not history:
        return DASH
    first, last = history[0], history[-1]
    parts = [
        f"{label} {first[key]:.3f} → {last[key]:.3f}"
        for label, key in (("sampled", "pass1"), ("greedy", "greedy"))
        if key in first and key in last
    ]
    return f"{', '.join(parts)} (version {last['version']})"


def _peers(status: Mapping[str, Any]) -> RenderableType:
    table = Table.grid(padding=(0, 3))
    workers = [(name, peer) for name, peer in status["peers"].items() if peer["role"] != "observer"]
    living = [entry for entry in workers if entry[1]["alive"]]
    gone = sorted((e for e in workers if not e[1]["alive"]), key=lambda entry: entry[1]["last_seen_s"])
    for name, peer in sorted(living, key=lambda entry: entry[1]["role"] != "learner")[:PEERS_SHOWN]:
        table.add_row(name, f"{peer['state']}, version {peer['version']}", _pace(peer, status), _usage(peer))
    if len(living) > PEERS_SHOWN:
        table.add_row(f"and {len(living) - PEERS_SHOWN} more")
    for name, peer in gone[:GONE_SHOWN]:
        table.add_row(name, f"gone: {peer['farewell'] or 'no sign of life'}")
    return table


def _pace(peer: Mapping[str, Any], status: Mapping[str, Any]) -> str:
    if peer["role"] == "learner":
        return f"{number((status['train'] or {}).get('tokens_per_s'), ',.0f')} tokens/s"
    return f"{number(peer['tokens_per_s'], ',.0f')} tokens/s"


def _usage(peer: Mapping[str, Any]) -> str:
    usage = peer["telemetry"]
    return f"{number(usage.get('cpu_cores'), '.1f')} cores, {number(usage.get('rss_mb'), ',.0f')} MiB{_gpu(usage)}"


def _gpu(usage: Mapping[str, float]) -> str:
    uses = [value for key, value in usage.items() if key.startswith("gpu") and key.endswith("_use")]
    return f", GPU {sum(uses) / len(uses):.0%}" if uses else ""


def _event(event: Mapping[str, Any]) -> str:
    return f"{time.strftime('%H:%M:%S', time.localtime(event['time']))} {event['text']}"


def number(value: Any, form: str) -> str:
    """A number in a format, or a dash where there is none."""
    return DASH if value is None else format(value, form)


def tracker_behind(status: Mapping[str, Any]) -> list[str]:
    """Says so when MLflow does not get the run's points."""
    tracking = status.get("tracking")
    if tracking is None or tracking["seconds_behind"] < BEHIND_SHOWN_S:
        return []
    why = f": {tracking['error']}" if tracking["error"] else ""
    return [
        f"MLflow is {tracking['points_behind']} points behind, for {tracking['seconds_behind']:.0f} s; they are kept in "
        f"metrics.jsonl and sent later{why}"
    ]


def line(status: Mapping[str, Any]) -> str:
    """The same in one line, where there is no terminal."""
    train = status["train"] or {}
    behind = "".join(f"  [{text}]" for text in tracker_behind(status))
    return (
        f"step {status['step']}/{status['steps_total']}  reward {number(train.get('reward'), '.3f')}  "
        f"held-out {held_out(status)}  staleness max {status['staleness']['max']}  "
        f"idle {number(train.get('idle_share'), '.0%')}{bottleneck(train)}  ETA {eta(status)}{behind}"
    )
