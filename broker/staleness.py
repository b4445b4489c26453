"""Bounded staleness as scheduling arithmetic: pure functions, no state, no clock.

Invariant (I1): no trained token is older than `max_staleness` versions. Step s trains on version s, so a group
whose oldest token comes from version a has a deadline: it must be trained at a step <= a + max_staleness. With
Q groups trained per step, the groups not yet taken can all meet their deadlines exactly when

    for every deadline d:  #(not taken, deadline <= d)  <=  (d - next_step + 1) * Q        (feasible)

(earliest-deadline-first on unit jobs; Jackson 1955). `room` admits a group only if that stays true, and
`leaves_feasible` lets a step go ahead only if it stays true afterwards: a step rather waits for a slow response
than lets it expire. While actors live, nothing is ever dropped for age, so long responses are not selected
against; dropping remains as the guarantee (`expired`) for what pacing cannot foresee, such as a dead actor.

With all actors current this is DESIGN's inequality: in flight + buffered + taken <= (max_staleness + 1) * Q.
"""

from __future__ import annotations

import math
from collections.abc import Mapping


def deadline(oldest_version: int, max_staleness: int) -> int:
    """Last step that may train on a group whose oldest token was sampled by `oldest_version`."""
    return oldest_version + max_staleness


def expired(oldest_version: int, step: int, max_staleness: int) -> bool:
    """Whether training that group at `step` would break I1."""
    return deadline(oldest_version, max_staleness) < step


def room(
    waiting: Mapping[int, int],
    *,
    version: int,
    next_step: int,
    last_step: int,
    groups_per_step: int,
    max_staleness: int,
) -> int:
    """How many more groups an actor at `version` may be leased.

    Args:
        waiting: groups leased or buffered but not taken, counted by deadline.
        version: oldest version that the new groups may be sampled with.
        next_step: first step whose groups are not taken yet.
        last_step: last step of the run; nothing is leased beyond its needs.
        groups_per_step: Q.
        max_staleness: bound of I1, in versions.
    """
    first = deadline(version, max_staleness)
    if first < next_step:
        return 0
    due = sum(count for when, count in waiting.items() if when < first)
    free = None
    for when in sorted({first, *(w for w in waiting if w >= first)}):
        due += waiting.get(when, 0)
        slots = (min(when, last_step) - next_step + 1) * groups_per_step
        free = slots - due if free is None else min(free, slots - due)
    return max(0, free or 0)


def fair_share(groups_per_step: int, max_staleness: int, actors: int) -> int:
    """Groups that one of `actors` actors may hold of all that may be in flight, so that the first to come leaves
    some to others."""
    return math.ceil((max_staleness + 1) * groups_per_step / max(1, actors))


def leaves_feasible(
    remaining: Mapping[int, int], in_flight: Mapping[int, int], next_step: int, groups_per_step: int
) -> bool:
    """Whether `next_step` may be taken now: what stays behind can still meet its deadlines.

    Waiting helps only while something due is in flight, so a shortage among groups that have all arrived (after a
    restart with a tighter bound) does not hold a step up; the sweep will expire what cannot be used.

    Args:
        remaining: groups left waiting, counted by deadline.
        in_flight: those of them that have not arrived, counted by deadline.
        next_step: the step about to be taken; later steps are the ones left to them.
        groups_per_step: Q.
    """
    due = awaited = 0
    for when in sorted(remaining):
        due += remaining[when]
        awaited += in_flight.get(when, 0)
        if awaited and due > max(0, when - next_step) * groups_per_step:
            return False
    return True
