"""Requests of the learner: rewind, serve, take, fetch, commit, pin.

Invariant: each may be repeated without harm. A step that is not there yet waits here, and its reply says who is
waited for (I4). A group that cannot be read any more costs its sampling, never the run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from broker.batch import batch_body
from broker.ending import Ending
from broker.group import Group, LedgerError, State
from broker.members import Peer
from broker.outbox import Origin, Outbox
from broker.points import step_points
from broker.profile import Profile
from broker.state import RunState
from broker.store import Buffer, Entry
from common.messages import (
    Ack,
    Batch,
    Commit,
    Fetch,
    GroupId,
    Payloads,
    Pin,
    Rewind,
    Rewound,
    Serve,
    Take,
)

log = logging.getLogger("slipstream.broker")


class WaitingTake(NamedTuple):
    """A take that waits since `since` until `until` (broker's monotonic clock)."""

    origin: Origin
    step: int
    since: float
    until: float


class LearnerRequests:
    """Handlers have the signature (origin, peer, message, now)."""

    def __init__(self, state: RunState, outbox: Outbox, ending: Ending) -> None:
        self._state, self._outbox, self._ending = state, outbox, ending
        self._waiting: dict[bytes, WaitingTake] = {}
        self._starved_since: float | None = None  # since when some step is asked for and not there
        self._committed: float | None = None

    def waiting_since(self, now: float) -> float | None:
        """Seconds that the learner has been waiting for a step; None when it is not."""
        return None if self._starved_since is None else now - self._starved_since

    def since_last_commit(self, now: float) -> float:
        """Seconds since the last step was committed, or since somebody first asked (after a restart)."""
        if self._committed is None:
            self._committed = now
        return now - self._committed

    # --- where it starts -------------------------------------------------------------------------------------

    def rewind(self, origin: Origin, peer: Peer, message: Rewind, now: float) -> None:
        """The learner starts from a checkpoint: undo what came after it."""
        state = self._state
        self._refuse_to_lose_the_run(message)
        era = state.ledger.era
        self._catch_up(message)
        outcome = state.ledger.rewind(message.step, message.version, state.store.kept)
        self._waiting.clear()
        self._starved_since = None
        if not state.ledger.finished:
            self._ending.cancel()
        if state.ledger.era != era:
            state.weights = None
            state.changed = True
            state.evaluations.rewind(message.version)
            state.evaluations.at(message.version, final=state.ledger.finished)
            state.event(
                f"learner {peer.name} starts from step {message.step}: era {state.ledger.era}, "
                f"{outcome.reopened} groups reopened, {outcome.dropped} dropped"
            )
        reply = Rewound(
            step=message.step, era=state.ledger.era, reopened=outcome.reopened, dropped=outcome.dropped
        )
        self._outbox.reply(origin, reply, durable=True)

    def _catch_up(self, message: Rewind) -> None:
        """The broker was gone while the learner stopped: its last commits were lost, and its checkpoint was not."""
        state = self._state
        before = state.ledger.step
        trained = state.ledger.catch_up(message.step) if message.version == message.step else []
        state.store.consumed([group.key for group in trained if group.state == State.CONSUMED])
        if trained:
            state.event(
                f"steps {before} to {message.step - 1} are committed: there is a checkpoint of what they made"
            )

    def _refuse_to_lose_the_run(self, message: Rewind) -> None:
        """A learner that does not see the checkpoints (a missing mount, another host) would undo every step."""
        pinned = self._state.pinned
        if message.step == 0 and pinned is not None and pinned["step"] > 0:
            raise LedgerError(
                "conflict",
                f"the learner starts from the base model although this run has a checkpoint of step {pinned['step']}: "
                f"start it with --resume where it sees {pinned['path']}, or start the run anew with --fresh",
            )

    def serve(self, origin: Origin, peer: Peer, message: Serve, now: float) -> None:
        """Where weights come from; actors learn it with their next heartbeat."""
        if message.weights.era != self._state.ledger.era:
            raise LedgerError(
                "stale", f"weights of era {message.weights.era}; this is era {self._state.ledger.era}"
            )
        self._state.weights = message.weights
        self._state.changed = True
        self._outbox.reply(origin, Ack(), durable=True)

    # --- a step ----------------------------------------------------------------------------------------------

    def take(self, origin: Origin, peer: Peer, message: Take, now: float) -> None:
        """Give the groups of a step, or wait for them."""
        self._waiting.pop(origin.connection, None)
        if self._give(origin, message.step):
            return
        if self._starved_since is None:
            self._starved_since = now
        self._waiting[origin.connection] = WaitingTake(origin, message.step, now, now + message.wait_s)

    def settle(self, now: float) -> None:
        """Answer takes whose groups are there or whose time is up."""
        for waiting in list(self._waiting.values()):
            try:
                given = self._give(waiting.origin, waiting.step)
            except LedgerError as error:
                given = True
                self._outbox.refuse(waiting.origin, error.code, str(error))
            except Exception as error:
                given = True
                self._state.defect("take", error)
                self._outbox.refuse(waiting.origin, "internal", f"{type(error).__name__}: {error}")
            if given or now >= waiting.until:
                del self._waiting[waiting.origin.connection]
            if not given and now >= waiting.until:
                self._outbox.reply(
                    waiting.origin, Batch(step=waiting.step, ready=False, reason=self._waits_for(now))
                )

    def _give(self, origin: Origin, step: int) -> bool:
        if self._state.ledger.finished:
            return False
        before = self._state.ledger.expired
        batch = self._take_whole(step)
        if self._state.ledger.expired > before:
            self._expired(self._state.ledger.expired - before)
        if batch is None:
            return False
        self._starved_since = None
        self._outbox.reply_plain(origin, "batch", batch, durable=True)
        return True

    def _take_whole(self, step: int) -> dict[str, Any] | None:
        """Take a step of which every group can be read; one that cannot is asked again, and another takes its place."""
        ledger = self._state.ledger
        while (groups := ledger.take(step)) is not None:
            entries, lost = self._read(groups)
            if not lost:
                rewards = [group.reward for group in groups if group.state == State.FILTERED]
                return batch_body(step, [entry.packed_header for entry in entries], len(groups), rewards)
            ledger.untake(step)
            ledger.lose(lost)
            self._state.event(
                f"{len(lost)} groups of step {step} could not be read and are sampled again: "
                f"{', '.join(map(str, lost[:5]))}",
                warning=True,
            )
        return None

    def _read(self, groups: Sequence[Group]) -> tuple[list[Entry], list[GroupId]]:
        """Published groups in their order, and which cannot be read."""
        entries, lost = [], []
        for group in groups:
            if group.state != State.FILTERED:
                try:
                    entries.append(self._entry(group))
                except LedgerError:
                    lost.append(group.key)
        return entries, lost

    def _expired(self, count: int) -> None:
        state = self._state
        state.event(
            f"{count} groups were too stale for step {state.ledger.next_step} and expired", warning=True
        )

    def _entry(self, group: Group) -> Entry:
        """A group that is taken. Raises LedgerError: it is lost (`stale`); a learner that takes it anew gets another."""
        try:
            entry = self._state.store.get(group.key)
        except OSError as error:
            log.warning("group %s cannot be read: %s", group.key, error)
            entry = None
        if entry is None:
            raise LedgerError("stale", f"group {group.key} is damaged: its step must be taken again")
        return entry

    def _waits_for(self, now: float) -> str:
        state = self._state
        if state.ledger.finished:
            return f"finished: {state.ledger.step} steps are done"
        lacking, urgent = state.ledger.missing()
        if not state.members.living("actor"):
            return f"{lacking} groups are missing: waiting for an actor to join"
        if not lacking and urgent:
            actors = ", ".join(sorted({group.actor for group in urgent})[:5])
            return f"{len(urgent)} groups in flight must not be overtaken: waiting for {actors}"
        in_flight = sum(1 for _ in state.ledger.leased)
        return f"{lacking} groups are missing, {in_flight} are in flight: waiting for actors"

    def fetch(self, origin: Origin, peer: Peer, message: Fetch, now: float) -> None:
        """Give payloads of taken groups."""
        payload: list[Buffer] = []
        for key in message.groups:
            group = self._state.ledger.groups.get(key)
            if group is None or group.state != State.TAKEN:
                raise LedgerError("conflict", f"group {key} is not taken")
            payload += self._entry(group).payload
        self._state.meters.bytes_out += sum(len(part) for part in payload)
        self._outbox.reply(origin, Payloads(groups=message.groups), payload)

    def commit(self, origin: Origin, peer: Peer, message: Commit, now: float) -> None:
        """A step is done: the next version exists."""
        state = self._state
        trained = [g for g in state.ledger.taken.get(message.step, ()) if g.state == State.TAKEN]
        groups = state.ledger.commit(message.step, message.version)
        if groups:
            entries, _ = self._read(trained)
            profiles = [entry.profile or Profile.of(entry.header) for entry in entries]
            state.meters.trained(message.step, profiles)
            state.store.consumed([group.key for group in trained])
            self._committed = now
            self._log_step(message, groups, now)
            state.evaluations.at(message.version, final=state.ledger.finished)
        self._outbox.reply(origin, Ack(), durable=True)

    def _log_step(self, message: Commit, groups: Sequence[Group], now: float) -> None:
        state = self._state
        state.changed = True
        state.last_commit_time = time.time()
        filtered = sum(group.state == State.FILTERED for group in groups)
        state.last_train = {"step": message.step, **message.metrics}
        state.spool.append("learner", message.step, message.metrics)
        for kind, point in step_points(state, len(groups), filtered, now).items():
            state.spool.append(kind, message.step, point)
        if message.samples:
            state.spool.append("samples", message.step, {"rows": message.samples})

    def pin(self, origin: Origin, peer: Peer, message: Pin, now: float) -> None:
        """A checkpoint is safe: the history before it is final."""
        state = self._state
        if message.step > state.ledger.step:
            raise LedgerError("conflict", f"step {message.step} is not committed yet")
        state.pinned = {"step": message.step, "path": message.path}
        state.changed = True
        state.store.pin(message.step, state.ledger)
        self._outbox.reply(origin, Ack(), durable=True)
