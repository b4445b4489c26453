"""The snapshot of a run for people, launchers and dashboards; keys documented in docs/operating.md.

Invariant: plain types only, every time in seconds, every count with its unit in its name or in the document.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from broker.ending import Ending
from broker.group import Group, LedgerError, State
from broker.state import RunState
from broker.store import Buffer
from common.messages import GroupId, GroupView
from common.tracking.delivery import tracking_view

LEASES_SHOWN = 100
GROUPS_SHOWN = 2000
EVALUATIONS_SHOWN = 100


def snapshot(
    state: RunState,
    ending: Ending,
    learner_waits_s: float | None,
    now: float,
    *,
    groups: bool = False,
    evaluations: int | None = None,
) -> dict[str, Any]:
    """The status of the run at `now` (broker's monotonic clock).

    Args:
        groups: list the buffer too.
        evaluations: show so many, the first and the newest; None shows all.
    """
    ledger, meters = state.ledger, state.meters
    ages = sorted((now - group.granted for group in ledger.leased), reverse=True)
    status = {
        "run": state.recipe.run.name,
        "time": time.time(),
        "started": state.started,
        "resumed": state.resumed,
        "step": ledger.step,
        "version": ledger.version,
        "era": ledger.era,
        "next_step": ledger.next_step,
        "steps_total": state.recipe.run.steps,
        "last_step": ledger.last_step,
        "epoch": ledger.frontier[0],
        "finished": ledger.finished,
        "ending": ending.reason,
        "disk_full": state.disk_full,
        "first_lease_time": state.first_lease_time,
        "last_commit_time": state.last_commit_time,
        "peers": {peer.name: peer.view(now) for peer in state.members.peers.values()},
        "ledger": ledger.counts(),
        "queue": _queue(state),
        "leases": {
            "count": len(ages),
            "oldest_s": round(ages[0], 3) if ages else 0.0,
            "ages_s": [round(age, 3) for age in ages[:LEASES_SHOWN]],
        },
        "staleness": {"bound": ledger.rules.max_staleness, **meters.staleness_view()},
        "lengths": {fate: lengths.view() for fate, lengths in meters.lengths.items()},
        "train": state.last_train,
        "rollouts": state.meters.rollouts.last,
        "evaluations": _ends(state.evaluations.history, evaluations),
        "accuracy": state.evaluations.accuracy,
        "evaluation_open": state.evaluations.waiting is not None or bool(state.evaluations.running),
        "evaluation": _open_evaluation(state, now),
        "pinned": state.pinned,
        "waits": _waits(state, learner_waits_s),
        "no_progress": state.standstill.view(now),
        "rates": _rates(state, now),
        "tracking": tracking_view(state.folder) if state.recipe.tracking.enabled else None,
        "events": list(state.events),
        "warnings": [event for event in state.events if event["warning"]],
    }
    if groups:
        status["groups"] = [_group_row(group) for group in _buffer(state)]
    return status


def _ends(history: list[dict[str, Any]], shown: int | None) -> list[dict[str, Any]]:
    if shown is None or len(history) <= shown:
        return history
    return [history[0], *history[1 - shown :]]


def _queue(state: RunState) -> dict[str, Any]:
    ledger = state.ledger
    return {
        "wanted_per_step": ledger.rules.groups_per_step,
        "capacity": (ledger.rules.max_staleness + 1) * ledger.rules.groups_per_step,
        "untaken": ledger.untaken,
        "room": ledger.room(ledger.version),
        "store_bytes": state.store.bytes_held,
    }


def _rates(state: RunState, now: float) -> dict[str, Any]:
    actors = state.members.living("actor")
    return {
        "actor_tokens_per_s": round(sum(peer.token_rate.per_second(now) for peer in actors), 3),
        "bytes_in": state.meters.bytes_in,
        "bytes_out": state.meters.bytes_out,
        "messages_in": state.meters.messages_in,
        "bad_messages": state.meters.bad_messages,
    }


def _open_evaluation(state: RunState, now: float) -> dict[str, Any] | None:
    """The oldest evaluation in an actor's hands, else the one that waits for an actor, else None."""
    evaluations = state.evaluations
    if evaluations.running:
        running = min(evaluations.running.values(), key=lambda job: job.since)
        seconds = round(now - running.since, 3)
        return {"version": running.job.requested, "actor": running.actor, "seconds": seconds}
    if evaluations.waiting is not None:
        since = state.last_commit_time or state.started
        seconds = round(max(0.0, time.time() - since), 3)
        return {"version": evaluations.waiting.requested, "actor": None, "seconds": seconds}
    return None


def _waits(state: RunState, learner_waits_s: float | None) -> list[dict[str, Any]]:
    """Who waits for whom, since how long: the learner as the broker sees it, others as they say."""
    waits = []
    if learner_waits_s is not None:
        lacking, urgent = state.ledger.missing()
        actors = sorted({group.actor for group in urgent})
        for_whom = ", ".join(actors) or "an actor to lease questions"
        waits.append(
            {
                "who": "learner",
                "for": for_whom,
                "seconds": round(learner_waits_s, 3),
                "groups_missing": lacking,
            }
        )
    waits.extend(
        {"who": peer.name, "for": peer.waiting_for, "seconds": peer.waiting_s}
        for peer in state.members.living()
        if peer.waiting_for
    )
    return waits


def _buffer(state: RunState) -> list[Group]:
    shown = (State.LEASED, State.BUFFERED, State.TAKEN)
    groups = [group for group in state.ledger.groups.values() if group.state in shown]
    return sorted(groups, key=lambda group: group.order)[:GROUPS_SHOWN]


def _group_row(group: Group) -> dict[str, Any]:
    return {
        "group": str(group.key),
        "state": group.state.name.lower(),
        "actor": group.actor,
        "lease": group.lease,
        "step": group.step if group.step >= 0 else None,
        "versions": [group.oldest, group.newest],
        "era": group.era,
        "reward": group.reward,
        "tokens": group.tokens,
    }


def group_view(state: RunState, key: GroupId) -> tuple[GroupView, Sequence[Buffer]]:
    """One group whole, with its payload where it is still kept.

    Raises:
        LedgerError: the question was never leased.
    """
    group = state.ledger.groups.get(key)
    if group is None:
        raise LedgerError("conflict", f"group {key} was never leased")
    entry = state.store.get(key)
    header = entry.header if entry else None
    view = GroupView(state=group.state.name.lower(), question=state.questions[key.index], header=header)
    return view, entry.payload if entry else ()
