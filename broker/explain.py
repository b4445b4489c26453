"""Who waits for whom, and since when: sentences for a person, from a status snapshot alone.

Invariant: a pure function of the snapshot (keys in docs/operating.md). The cause comes first: what is listed
later may be a consequence of what is listed before. Nothing is said of a run that simply works.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

SHOWN_S = 2.0  # shorter waits are part of every healthy step
SILENT_S = 10.0
PUSH_SHOWN_S = 10.0  # a push of a large model takes seconds
NAMES = 3
NO_ROOM = "waiting for disk space"  # state of a learner that cannot write its last checkpoint

Snapshot = Mapping[str, Any]


class Cause(NamedTuple):
    """Something that holds the run up: a sentence, and since how many seconds (None: not known)."""

    text: str
    seconds: float | None = None

    def __str__(self) -> str:
        return self.text if self.seconds is None else f"{self.text} ({duration(self.seconds)})"


def duration(seconds: float) -> str:
    """Seconds as a person says them: 12 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def explain(status: Snapshot) -> list[Cause]:
    """What holds the run up, causes before consequences; empty when it goes on by itself.

    Args:
        status: as the broker answers a `StatusQuery`.
    """
    if status["finished"] and not status["evaluation_open"]:
        return list(_unsaved(status))
    looks = (
        *(_standstill, _ending, _disk, _unsaved, _absent, _lost, _silent, _draining),
        *(_push, _learner, _actors, _evaluation, _others),
    )
    return [cause for look in looks for cause in look(status)]


def _living(status: Snapshot, role: str) -> dict[str, Any]:
    return {name: peer for name, peer in status["peers"].items() if peer["role"] == role and peer["alive"]}


def _gone(status: Snapshot, role: str) -> dict[str, Any]:
    return {
        name: peer for name, peer in status["peers"].items() if peer["role"] == role and not peer["alive"]
    }


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(sorted(names)[:NAMES])
    return shown if len(names) <= NAMES else f"{shown} and {len(names) - NAMES} more"


def _standstill(status: Snapshot) -> Iterator[Cause]:
    still = status["no_progress"]
    if still["stalled"]:
        where = f"; stacks: {still['stacks']}" if still["stacks"] else ""
        yield Cause(f"no progress: no version, no group, no evaluation{where}", still["seconds"])


def _ending(status: Snapshot) -> Iterator[Cause]:
    if status["ending"]:
        left = [*_living(status, "actor"), *_living(status, "learner")]
        waiting = f"; waiting for {_names(left)} to leave" if left else ""
        yield Cause(f"the run ends: {status['ending']}{waiting}")


def _disk(status: Snapshot) -> Iterator[Cause]:
    if status["disk_full"]:
        yield Cause(f"{status['disk_full']}: free some space, and it goes on by itself")


def _unsaved(status: Snapshot) -> Iterator[Cause]:
    """Checkpoints that cannot be written: what was trained since the last one would be lost with the learner."""
    failures = int((status["train"] or {}).get("checkpoint_failures", 0))
    for peer in _living(status, "learner").values():
        if peer["state"] == NO_ROOM:
            wait = f"the learner waits for {peer['waiting_for']}: free some space, and the run ends by itself"
            yield Cause(wait, peer["waiting_s"])
            return
    if failures and not status["finished"]:
        last = status["pinned"]["step"] if status["pinned"] else 0
        yield Cause(
            f"checkpoints cannot be written ({failures} in a row): free some space; a learner that dies goes back "
            f"to step {last}"
        )


def _absent(status: Snapshot) -> Iterator[Cause]:
    if status["ending"] or status["finished"]:
        return
    since = status["time"] - status["started"]
    if not _living(status, "actor"):
        gone = _gone(status, "actor")
        ago = min((peer["last_seen_s"] for peer in gone.values()), default=since)
        what = f"every actor is gone ({_names(list(gone))})" if gone else "no actor has joined"
        yield Cause(f"{what}: the learner waits for one", ago)
    if not _living(status, "learner"):
        gone = _gone(status, "learner")
        ago = min((peer["last_seen_s"] for peer in gone.values()), default=since)
        what = "the learner is gone" if gone else "no learner has joined"
        yield Cause(f"{what}: actors go on until the buffer is full", ago)


def _lost(status: Snapshot) -> Iterator[Cause]:
    living = _living(status, "actor")
    dead = {n: p for n, p in _gone(status, "actor").items() if p["farewell"].startswith("dead")}
    if living and dead:
        ago = min(peer["last_seen_s"] for peer in dead.values())
        yield Cause(f"{_names(list(dead))} lost: its questions went to others", ago)


def _silent(status: Snapshot) -> Iterator[Cause]:
    """In the run, and not heard of for several heartbeats: stopped, suspended, or cut off."""
    for role in ("learner", "actor"):
        silent = {n: p for n, p in _living(status, role).items() if p["last_seen_s"] >= SILENT_S}
        if silent:
            ago = max(peer["last_seen_s"] for peer in silent.values())
            yield Cause(f"no sign of life from {_names(list(silent))}: paused, frozen or cut off", ago)


def _draining(status: Snapshot) -> Iterator[Cause]:
    leaving = [name for name, peer in _living(status, "actor").items() if peer["state"] == "draining"]
    if leaving and not status["ending"]:
        yield Cause(f"{_names(leaving)} told to leave: finishing what is in hand")


def _push(status: Snapshot) -> Iterator[Cause]:
    """Actors that still sample from an older version long after a newer one was committed."""
    if not status["last_commit_time"] or not _living(status, "learner"):
        return
    age = status["time"] - status["last_commit_time"]
    behind = [n for n, p in _living(status, "actor").items() if (p["era"], p["version"]) < _newest(status)]
    if behind and age >= PUSH_SHOWN_S:
        yield Cause(
            f"version {status['version']} has not reached {_names(behind)}: the weight push is stuck or slow",
            age,
        )


def _newest(status: Snapshot) -> tuple[int, int]:
    return status["era"], status["version"]


def _learner(status: Snapshot) -> Iterator[Cause]:
    """The learner lacks groups although actors are there: they are slow."""
    if not _living(status, "actor"):
        return
    for wait in status["waits"]:
        if "groups_missing" in wait and wait["seconds"] >= SHOWN_S:
            rate = status["rates"]["actor_tokens_per_s"]
            yield Cause(
                f"the learner waits for {wait['for']}: {wait['groups_missing']} groups are missing, "
                f"{status['leases']['count']} in flight, actors make {rate:,.0f} tokens/s",
                wait["seconds"],
            )


def _actors(status: Snapshot) -> Iterator[Cause]:
    """Actors have nothing to do: the buffer is full, because the learner is slow (or gone)."""
    idle = {
        n: p for n, p in _living(status, "actor").items() if p["waiting_for"] and p["waiting_s"] >= SHOWN_S
    }
    reasons: dict[str, list[str]] = {}
    for name, peer in idle.items():
        reasons.setdefault(peer["waiting_for"], []).append(name)
    doing = ", ".join(f"{n} is {p['state']}" for n, p in _living(status, "learner").items())
    for reason, names in reasons.items():
        full = f" ({doing})" if doing and "buffer is full" in reason else ""
        longest = max(idle[name]["waiting_s"] for name in names)
        yield Cause(f"{_names(names)}: {reason}{full}", longest)


def _evaluation(status: Snapshot) -> Iterator[Cause]:
    found = status["evaluation"]
    if found is None or (found["seconds"] or 0.0) < SHOWN_S:
        return
    if found["actor"] is None:
        yield Cause(
            f"the evaluation of version {found['version']} waits for an actor with that version",
            found["seconds"],
        )
    elif status["finished"]:
        yield Cause(
            f"the last evaluation (version {found['version']}) is with {found['actor']}", found["seconds"]
        )


def _others(status: Snapshot) -> Iterator[Cause]:
    """What the learner says of itself, where the broker does not see it waiting."""
    seen = any("groups_missing" in wait for wait in status["waits"])
    for name, peer in _living(status, "learner").items():
        if peer["waiting_for"] and peer["waiting_s"] >= SHOWN_S and not seen and peer["state"] != NO_ROOM:
            yield Cause(f"{name} waits for {peer['waiting_for']}", peer["waiting_s"])
