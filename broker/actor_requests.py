"""Requests of actors: lease, publish, release, evaluation results.

Invariant: a lease is granted only where admission allows it (I1); where it does not, the request waits here, and
its sender is told what it waits for. One waiting request per actor: a newer one, over whichever connection,
replaces it, so that no grant goes to a connection that is no more.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from broker import staleness
from broker.checks import check_group
from broker.ending import Ending
from broker.group import Facts, Group
from broker.members import Peer
from broker.outbox import Origin, Outbox
from broker.profile import Profile
from broker.state import RunState
from broker.store import Buffer, Entry
from common.messages import (
    Ack,
    EvalJob,
    EvalResult,
    Grant,
    GroupHeader,
    Lease,
    MalformedMessage,
    Publish,
    Release,
)

ENDING_HOLD_S = 0.5
RECEIVE_BUFFER = 8192
BYTES_PER_TOKEN = 8  # int32 id, float32 log-probability


class Waiting(NamedTuple):
    """A lease request that waits until `until` (broker's monotonic clock)."""

    origin: Origin
    actor: str
    message: Lease
    until: float


class ActorRequests:
    """Handlers have the signature (origin, peer, message, now); `publish` takes header frame and payload before `now`."""

    def __init__(self, state: RunState, outbox: Outbox, ending: Ending) -> None:
        self._state, self._outbox, self._ending = state, outbox, ending
        self._waiting: dict[bytes, Waiting] = {}  # by connection, in the order of arrival
        self._line_of: dict[str, bytes] = {}  # connection that an actor waits on
        self._policies: Counter[tuple[int, int]] = Counter()  # (era, version) of those who wait
        self._next_expiry = math.inf
        self._last_grant: dict[str, tuple[Origin, dict[str, Any]]] = {}  # per actor

    # --- leases --------------------------------------------------------------------------------------------

    def lease(self, origin: Origin, peer: Peer, message: Lease, now: float) -> None:
        """Grant what can be granted at once, else wait. Asked again for the same: the same answer again."""
        # By number alone: an actor that had to connect anew asks over another connection.
        if (last := self._last_grant.get(peer.name)) is not None and last[0].request == origin.request:
            self._outbox.reply_plain(origin, "grant", last[1], durable=True)
            return
        wait_s = min(message.wait_s, ENDING_HOLD_S) if self._ending.reason else message.wait_s
        waiting = Waiting(origin, peer.name, message, now + wait_s)
        if (line := self._line_of.get(peer.name)) is not None:
            self._drop(self._waiting[line])
        if not self._grant(waiting, now):
            self._wait(waiting)

    def settle(self, now: float) -> None:
        """Grant to those who wait, first come first served; tell the others when their time is up.

        A thousand actors that wait cost a look at their few policies, not at each of them.
        """
        while (waiting := self._next_in_line()) is not None and self._grant(waiting, now):
            self._drop(waiting)
        if now >= self._next_expiry:
            self._expire(now)

    def _next_in_line(self) -> Waiting | None:
        open_to = {policy for policy in self._policies if self._may_get_work(*policy)}
        if not open_to:
            return None
        for waiting in self._waiting.values():
            if (waiting.message.era, waiting.message.version) in open_to and self._has_work_for(waiting):
                return waiting
        return None

    def holds(self, peer: Peer, era: int, version: int) -> None:
        """An actor says which policy it holds: a request that it waits with is from now on one of that policy.

        Without this, a request that was made just before new weights came would wait out its time with old ones.
        """
        connection = self._line_of.get(peer.name)
        waiting = self._waiting.get(connection) if connection is not None else None
        if waiting is None or (era, version) <= (waiting.message.era, waiting.message.version):
            return
        newer = msgspec.structs.replace(waiting.message, era=era, version=version)
        self._count(waiting, -1)
        self._waiting[waiting.origin.connection] = renewed = waiting._replace(message=newer)
        self._count(renewed, +1)

    def _may_get_work(self, era: int, version: int) -> bool:
        state = self._state
        if self._ending.reason is not None or not state.ledger.exists(era, version):
            return False
        return state.ledger.room(version) > 0 or state.evaluations.wants(version)

    def _has_work_for(self, waiting: Waiting) -> bool:
        version = waiting.message.version
        if self._state.evaluations.open_to(waiting.actor, version):
            return True
        return self._share(waiting) > 0 and self._state.ledger.room(version) > 0

    def _wait(self, waiting: Waiting) -> None:
        self._waiting[waiting.origin.connection] = waiting
        self._line_of[waiting.actor] = waiting.origin.connection
        self._count(waiting, +1)
        self._next_expiry = min(self._next_expiry, waiting.until)

    def _drop(self, waiting: Waiting) -> None:
        del self._waiting[waiting.origin.connection]
        self._line_of.pop(waiting.actor, None)
        self._count(waiting, -1)

    def _count(self, waiting: Waiting, change: int) -> None:
        policy = waiting.message.era, waiting.message.version
        self._policies[policy] += change
        if not self._policies[policy]:
            del self._policies[policy]

    def _expire(self, now: float) -> None:
        for waiting in [w for w in self._waiting.values() if now >= w.until]:
            self._drop(waiting)
            self._outbox.reply(waiting.origin, Grant(groups=[], reason=self._why_not(waiting.message)))
        self._next_expiry = min((w.until for w in self._waiting.values()), default=math.inf)

    def forget(self, actor: str) -> None:
        """An actor is gone: so are its waiting requests."""
        for waiting in [w for w in self._waiting.values() if w.actor == actor]:
            self._drop(waiting)
        self._last_grant.pop(actor, None)

    def _grant(self, waiting: Waiting, now: float) -> bool:
        state, message = self._state, waiting.message
        if self._ending.reason is not None or not state.ledger.exists(message.era, message.version):
            return False
        job = state.evaluations.grant(waiting.actor, message.version, now)
        groups = state.ledger.lease(
            waiting.actor, self._share(waiting), era=message.era, version=message.version, now=now
        )
        if job is None and not groups:
            return False
        state.changed |= job is not None
        if groups and state.first_lease_time is None:
            state.first_lease_time = time.time()
            state.changed = True
        self._send_grant(waiting, groups, job)
        return True

    def _share(self, waiting: Waiting) -> int:
        """Groups that an actor may be leased now: no more than it asks for, and than its fair share leaves."""
        rules, actors = self._state.ledger.rules, self._state.members.living_actors
        fair = staleness.fair_share(rules.groups_per_step, rules.max_staleness, actors)
        return max(0, min(waiting.message.capacity, fair - self._state.ledger.held_by(waiting.actor)))

    def _send_grant(self, waiting: Waiting, groups: Sequence[Group], job: EvalJob | None) -> None:
        recipe = self._state.recipe
        assignments = [
            {
                "group": group.key,
                "lease": group.lease,
                "question": self._state.questions[group.key.index],
                "samples": recipe.rollout.group_size,
                "deadline_s": recipe.broker.lease_s,
            }
            for group in groups
        ]
        grant = {"groups": assignments, "evaluation": job, "reason": None}
        self._last_grant[waiting.actor] = (waiting.origin, grant)
        self._outbox.reply_plain(waiting.origin, "grant", grant, durable=True)

    def _why_not(self, message: Lease) -> str:
        state, ledger = self._state, self._state.ledger
        if self._ending.reason is not None:
            return f"the run ends: {self._ending.reason}"
        if not ledger.exists(message.era, message.version):
            return (
                f"waiting for weights: version {message.version} of era {message.era} is not of this history"
            )
        if ledger.finished:
            return "every step is done"
        if ledger.remaining == ledger.untaken:
            return "every question of the run is given out"
        if message.version < ledger.version and ledger.room(ledger.version) > 0:
            return f"waiting for the weights of version {ledger.version}"
        learners = state.members.living("learner")
        who = f"learner {learners[0].name}" if learners else "a learner to join"
        return f"the buffer is full ({ledger.untaken} groups in flight or buffered): waiting for {who}"

    # --- groups ----------------------------------------------------------------------------------------------

    def publish(
        self,
        origin: Origin,
        peer: Peer,
        message: Publish,
        frame: bytes,
        payload: Sequence[Buffer],
        now: float,
    ) -> None:
        """Check a group, put it into ledger and store, acknowledge once both are saved."""
        header, state = message.header, self._state
        if header.actor != peer.name:
            raise MalformedMessage(f"published as {header.actor} by {peer.name}")
        profile = Profile.of(header)
        check_group(header, profile, payload, state.limits)
        outcome = state.ledger.publish(_facts(header, profile))
        if outcome.status == "unknown":
            self._outbox.refuse(origin, "conflict", outcome.reason or "")
            return
        if outcome.status == "future":
            self._outbox.refuse(origin, "not_now", outcome.reason or "")
            return
        if outcome.status == "accepted":
            buffers = [_compact(part) for part in payload]
            state.store.put(header.group, Entry(frame, buffers, profile))
        if outcome.status != "duplicate":
            self._measure(peer, profile, outcome.status, now)
        ack = {"status": outcome.status, "reason": outcome.reason}
        self._outbox.reply_plain(origin, "ack", ack, durable=True)

    def _measure(self, peer: Peer, profile: Profile, status: str, now: float) -> None:
        meters = self._state.meters
        meters.lengths["sampled"].add(profile.lengths)
        if status in ("filtered", "expired"):
            meters.lengths[status].add(profile.lengths)
        meters.rollouts.add(profile, self._state.ledger.version - profile.oldest)
        meters.bytes_in += BYTES_PER_TOKEN * profile.tokens
        peer.groups += 1
        peer.tokens += profile.tokens
        peer.token_rate.add(profile.tokens, now)

    def release(self, origin: Origin, peer: Peer, message: Release, now: float) -> None:
        """Take leases back."""
        ledger = self._state.ledger
        count = ledger.release(peer.name, message.groups, message.reason, message.cause)
        if count or message.evaluation is None:
            self._state.event(f"actor {peer.name} hands back {count} leases: {message.reason[:200]}")
        if message.evaluation is not None:
            self._take_back(peer, message.evaluation, message.reason[:200])
        self._outbox.reply(origin, Ack(), durable=True)

    # --- evaluations -----------------------------------------------------------------------------------------

    def _take_back(self, peer: Peer, job: int, reason: str) -> None:
        fate = "goes to another" if self._state.evaluations.hand_back(peer.name, job) else "is given up"
        self._state.changed = True
        self._state.event(
            f"actor {peer.name} failed at evaluation {job}, which {fate}: {reason}", warning=True
        )

    def eval_result(self, origin: Origin, peer: Peer, message: EvalResult, now: float) -> None:
        """Take in the answers to an evaluation."""
        state = self._state
        if not state.ledger.exists(message.era, message.version):
            state.evaluations.drop_actor(peer.name)
            self._outbox.reply(origin, Ack(status="expired", reason="answered by a version that was rewound"))
            return
        try:
            entry = state.evaluations.result(message)
        except ValueError as error:
            raise MalformedMessage(str(error)) from None
        if entry is None:
            self._outbox.reply(origin, Ack(status="duplicate"))
            return
        state.changed = True
        state.spool.append("eval", message.version, {k: v for k, v in entry.items() if k != "version"})
        self._outbox.reply(origin, Ack(status="accepted"), durable=True)


def _compact(part: Buffer) -> Buffer:
    """Small frames share a receive buffer of 8 KiB, which they would keep alive: copy them out."""
    return part if len(part) > RECEIVE_BUFFER else bytes(part)


def _facts(header: GroupHeader, profile: Profile) -> Facts:
    rewards = profile.rewards
    return Facts(
        key=header.group,
        lease=header.lease,
        actor=header.actor,
        era=header.era,
        oldest=profile.oldest,
        newest=profile.newest,
        reward=sum(rewards) / len(rewards),
        tokens=profile.tokens,
        zero_variance=min(rewards) == max(rewards),
    )
