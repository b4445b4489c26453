"""The broker's answers: requests in, replies and state changes out, without sockets or clocks of its own.

Invariant: `receive` never raises and never changes state on a bad request (I8): it is answered with the reason,
counted against its sender and, past `broker.max_bad_messages`, the sender is shut out until some are forgiven. A
request that cannot be answered yet waits here, at most as long as its sender said (I4).

The loop calls `receive` for each message, then `settle` once, saves the store, and sends the outbox.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from broker.actor_requests import ActorRequests
from broker.alarm import Alarm
from broker.ending import Command, Ending
from broker.group import LedgerError
from broker.learner_requests import LearnerRequests
from broker.members import LEFT, MAX_PEERS, Peer
from broker.outbox import Origin, Outbox
from broker.state import RunState
from broker.status import EVALUATIONS_SHOWN, group_view, snapshot
from broker.store import Buffer
from common.codec import decode, request_number
from common.messages import (
    Ack,
    Drain,
    Goodbye,
    GroupQuery,
    Heartbeat,
    Hello,
    MalformedMessage,
    Message,
    Stacks,
    Status,
    StatusQuery,
    Stop,
    Welcome,
)
from common.recipe.digest import sampling_digest
from common.software import compatible, software_version

ACTOR_KINDS = ("lease", "publish", "release", "eval_result")
LEARNER_KINDS = ("rewind", "serve", "take", "fetch", "commit", "pin")
COMMON_KINDS = ("heartbeat", "goodbye", "stop", "drain", "stacks", "status_query", "group_query")
# Heartbeats missed after which another process may take over an actor's name; see `_silence_of`.
SILENT_BEATS = 2.0
ABSENT_S = 2.0
SKEW_S = 60.0  # of a peer's clock: more than a heartbeat that was sent again can be late
INTAKE = ("lease", "publish", "take", "commit", "rewind", "eval_result")


class Service:
    """See the module's docstring."""

    def __init__(self, state: RunState) -> None:
        self.state = state
        self.outbox = Outbox()
        self.ending = Ending(state.members, state.recipe.broker.final_eval_s)
        self.actors = ActorRequests(state, self.outbox, self.ending)
        self.learner = LearnerRequests(state, self.outbox, self.ending)
        self.alarm = Alarm(state, self.ending, self.learner.waiting_since)
        self._draining: dict[str, str] = {}  # actors that are to leave, and why
        self._software = software_version()
        self._sampling = sampling_digest(state.recipe)
        self._last_tick: float | None = None
        self._handlers: dict[str, Callable[..., None]] = {
            "heartbeat": self._heartbeat,
            "goodbye": self._goodbye,
            "stop": self._stop,
            "drain": self._drain,
            "stacks": self._stacks,
            "status_query": self._status,
            "group_query": self._group,
            **{kind: getattr(self.actors, kind) for kind in ACTOR_KINDS},
            **{kind: getattr(self.learner, kind) for kind in LEARNER_KINDS},
        }
        self._ask_for_evaluation()

    # --- what the loop calls --------------------------------------------------------------------------------

    def receive(self, connection: bytes, frames: Sequence[Buffer], now: float) -> None:
        """Take in one message: `frames` are the header and the payload."""
        self.state.meters.messages_in += 1
        header = bytes(frames[0]) if frames else b""
        try:
            message, request = decode(header)
        except MalformedMessage as error:
            self._bad(Origin(connection, request_number(header)), str(error), now)
            return
        origin = Origin(connection, request)
        try:
            self._answer(origin, message, header, frames[1:], now)
        except MalformedMessage as error:
            self._bad(origin, f"{message.kind}: {error}", now)
        except LedgerError as error:
            self.outbox.refuse(origin, error.code, str(error))
        except Exception as error:
            self.state.defect(message.kind, error)
            self.outbox.refuse(origin, "internal", f"{type(error).__name__}: {error}")

    def settle(self, now: float) -> None:
        """Answer waiting requests whose time or turn has come. Steps first: they make room for leases."""
        self.learner.settle(now)
        self.actors.settle(now)

    def tick(self, now: float) -> None:
        """Once in a while: who has fallen silent, which leases ran out, whether the run is over."""
        self._excuse_own_absence(now)
        for peer in self.state.members.silent(now):
            self._remove(peer, "dead", f"not heard of for {now - peer.seen:.0f} s", now)
        for group in self.state.ledger.tick(now, self.state.members.alive):
            self.state.event(f"lease {group.lease} of group {group.key} ran out", warning=True)
        self.state.evaluations.tick(now)
        self._finish(now)
        self.alarm.tick(now)

    def _excuse_own_absence(self, now: float) -> None:
        """If the broker itself stood still (a slow disk, a suspended machine), nobody else was silent."""
        absent, self._last_tick = now - (self._last_tick or now), now
        if absent > ABSENT_S:
            self.state.members.excuse(absent)
            self.state.standstill.excuse(absent)
            self.state.ledger.excuse(absent)

    def _finish(self, now: float) -> None:
        state = self.state
        if self.ending.reason is not None or not state.ledger.finished:
            return
        state.ledger.close()
        self._ask_for_evaluation()
        if state.over:
            self.ending.begin("finished", now, asked=False)
        elif self.learner.since_last_commit(now) > state.recipe.broker.final_eval_s:
            state.event(
                f"no actor answered the last evaluation within broker.final_eval_s = "
                f"{state.recipe.broker.final_eval_s:.0f} s; the run ends without it",
                warning=True,
            )
            self.ending.begin("finished", now, asked=False)

    # --- routing -------------------------------------------------------------------------------------------

    def _answer(
        self, origin: Origin, message: Message, header: bytes, payload: Sequence[Buffer], now: float
    ) -> None:
        if payload and message.kind != "publish":
            raise MalformedMessage("it has no payload")
        if isinstance(message, Hello):
            self._hello(origin, message, now)
            return
        if self.state.members.shut_out(origin.connection, now):
            self.outbox.refuse(origin, "shut_out", "too many malformed messages")
            return
        peer = self.state.members.of(origin.connection)
        if peer is None:
            self.outbox.refuse(origin, "unknown_peer", "say Hello first")
            return
        peer.seen = now
        self._check_role(peer, message)
        if self.state.disk_full and message.kind in INTAKE:
            self.outbox.refuse(origin, "full", self.state.disk_full)
            return
        handler = self._handlers[message.kind]
        if message.kind == "publish":
            handler(origin, peer, message, header, payload, now)
        else:
            handler(origin, peer, message, now)

    @staticmethod
    def _check_role(peer: Peer, message: Message) -> None:
        kind = message.kind
        if kind in COMMON_KINDS:
            return
        if (kind in ACTOR_KINDS and peer.role == "actor") or (
            kind in LEARNER_KINDS and peer.role == "learner"
        ):
            return
        raise MalformedMessage(f"not a request that {peer.role}s may send")

    def _bad(self, origin: Origin, reason: str, now: float) -> None:
        self.state.meters.bad_messages += 1
        count = self.state.members.misbehaved(origin.connection, now)
        limit = self.state.members.max_bad
        if count == limit:
            peer = self.state.members.of(origin.connection)
            who = peer.name if peer else "a connection that never said Hello"
            self.state.event(
                f"{who} is shut out after {count} malformed messages; last: {reason}", warning=True
            )
        if count <= 2 * limit:  # past that, silence: an answer to everything would be a service to a flood
            self.outbox.refuse(origin, "shut_out" if count >= limit else "malformed", reason[:500])

    # --- every peer ------------------------------------------------------------------------------------------

    def _hello(self, origin: Origin, hello: Hello, now: float) -> None:
        state = self.state
        if state.members.shut_out(origin.connection, now, hello.peer):
            self.outbox.refuse(origin, "shut_out", "too many malformed messages")
            return
        if reason := self._incompatible(hello):
            self.outbox.refuse(origin, "incompatible", reason)
            return
        if hello.sampling not in (None, self._sampling):
            reason = f"the run was resumed with another recipe than {hello.peer} samples by: it must be started again"
            self.outbox.refuse(origin, "changed", reason)
            return
        if reason := self._conflict(hello):
            self.outbox.refuse(origin, "conflict", reason)
            return
        if (earlier := self._predecessor(hello)) is not None:
            silence, limit_s = now - earlier.seen, self._silence_of(earlier)
            if silence < limit_s and not earlier.has_ended():
                self.outbox.refuse(origin, "not_now", _taken(earlier, silence, limit_s), passes_s=limit_s)
                return
            self._remove(earlier, "restarted", "came back as another process", now)
        if hello.tokenizer is not None and state.tokenizer is None:
            state.tokenizer = hello.tokenizer
            state.changed = True
        was_in = state.members.alive(hello.peer)
        peer = state.members.join(origin.connection, hello, now)
        if not was_in and peer.role != "observer":
            state.changed = True
            who = peer.name if peer.name.startswith(peer.role) else f"{peer.role} {peer.name}"
            state.event(f"{who} joined from {peer.host}")
        self._welcome(origin)

    def _predecessor(self, hello: Hello) -> Peer | None:
        """Another process that is in the run as the actor or learner that says Hello."""
        known = self.state.members.peers.get(hello.peer)
        if known is None or not known.alive or hello.role == "observer" or known.is_process_of(hello):
            return None
        return known

    def _silence_of(self, peer: Peer) -> float:
        """Seconds of silence after which another process may take a name: a second learner rewinds a whole run."""
        broker = self.state.recipe.broker
        return broker.dead_after_s if peer.role == "learner" else SILENT_BEATS * broker.heartbeat_s

    def _incompatible(self, hello: Hello) -> str | None:
        name = self.state.recipe.run.name
        if hello.run is not None and hello.run != name:
            return f"this broker serves the run '{name}', not '{hello.run}'"
        if not compatible(hello.software, self._software):
            return (
                f"this broker is Slipstream {self._software} and {hello.peer} on {hello.host} is {hello.software}: "
                "install the same version there"
            )
        if None not in (hello.tokenizer, self.state.tokenizer) and hello.tokenizer != self.state.tokenizer:
            return (
                f"the tokenizer of {hello.peer} on {hello.host} differs from that of the others in this run: "
                "model.path must hold the same model on every host"
            )
        return None

    def _conflict(self, hello: Hello) -> str | None:
        known = self.state.members.peers.get(hello.peer)
        if known is not None and known.alive and known.role != hello.role:
            return f"'{hello.peer}' is already in the run as {known.role}"
        if known is None and len(self.state.members.peers) >= MAX_PEERS:
            return f"{MAX_PEERS} peers are in this run"
        others = [p.name for p in self.state.members.living("learner") if p.name != hello.peer]
        if hello.role == "learner" and others:
            return f"the learner '{others[0]}' is in the run; there is one learner at a time"
        return None

    def _welcome(self, origin: Origin) -> None:
        state = self.state
        welcome = Welcome(
            run=state.recipe.run.name or "run",
            recipe=state.recipe.model_dump(mode="json"),
            folder=str(state.folder.resolve()),
            step=state.ledger.step,
            next_step=state.ledger.next_step,
            version=state.ledger.version,
            era=state.ledger.era,
            weights=state.weights,
            heartbeat_s=state.recipe.broker.heartbeat_s,
            resumed=state.resumed,
        )
        self.outbox.reply(origin, welcome)

    def _heartbeat(self, origin: Origin, peer: Peer, beat: Heartbeat, now: float) -> None:
        state = self.state
        if peer.role == "actor":
            state.ledger.renew(peer.name, beat.leases, now)
            self.actors.holds(peer, beat.era, beat.version)
        state.members.heard(peer, beat)
        self._compare_clocks(peer, beat)
        pulse = {
            "step": state.ledger.step,
            "version": state.ledger.version,
            "era": state.ledger.era,
            "weights": state.weights,
            "command": self._command(peer, now),
            "reason": self.ending.reason or self._draining.get(peer.name),
            "dump_stacks": self.alarm.request,
            "actors": [p.name for p in state.members.living("actor")] if peer.role == "learner" else None,
        }
        self.outbox.reply_plain(origin, "pulse", pulse)

    def _command(self, peer: Peer, now: float) -> Command:
        command = self.ending.command(peer.role, now)
        return "drain" if command == "run" and peer.name in self._draining else command

    def _compare_clocks(self, peer: Peer, beat: Heartbeat) -> None:
        """Say once that a peer's clock is off. Nothing depends on it: leases count on the broker's own clock."""
        if beat.time is None or peer.clock_off or abs(skew := beat.time - time.time()) < SKEW_S:
            return
        peer.clock_off = True
        side = "ahead of" if skew > 0 else "behind"
        self.state.event(
            f"the clock of {peer.name} on {peer.host} is {abs(skew):.0f} s {side} the broker's: leases are not "
            "affected, but times in its log do not line up; let chronyd or systemd-timesyncd keep it",
            warning=True,
        )

    def _drain(self, origin: Origin, peer: Peer, message: Drain, now: float) -> None:
        """Tell actors to leave when their work in hand is done; the others stay."""
        strangers = [name for name in message.actors if not self._is_actor(name)]
        if strangers:
            raise LedgerError("conflict", f"no actor of this run is called {', '.join(strangers[:5])}")
        for name in message.actors:
            self._draining[name] = message.reason
        self.state.event(f"{peer.name} sends {', '.join(message.actors)} away: {message.reason}")
        self.outbox.reply(origin, Ack())

    def _is_actor(self, name: str) -> bool:
        peer = self.state.members.peers.get(name)
        return peer is not None and peer.alive and peer.role == "actor"

    def _stacks(self, origin: Origin, peer: Peer, message: Stacks, now: float) -> None:
        self.alarm.answered(peer, message)
        self.outbox.reply(origin, Ack())

    def _goodbye(self, origin: Origin, peer: Peer, message: Goodbye, now: float) -> None:
        self.outbox.reply(origin, Ack())
        if peer.role == "actor":
            held = [group.key for group in self.state.ledger.leased if group.actor == peer.name]
            self.state.ledger.release(peer.name, held, message.reason, "leaving")
        self._remove(peer, LEFT, message.reason, now)

    def _remove(self, peer: Peer, outcome: str, reason: str, now: float) -> None:
        state = self.state
        state.members.leave(peer, f"{outcome}: {reason}")
        self._draining.pop(peer.name, None)
        if peer.role == "observer":
            return
        state.changed = True
        lost = state.ledger.drop_actor(peer.name, f"actor {outcome}") if peer.role == "actor" else 0
        state.evaluations.drop_actor(peer.name)
        self.actors.forget(peer.name)
        again = f"; {lost} leases go to others" if lost else ""
        state.event(f"{peer.role} {peer.name} {outcome}: {reason}{again}", warning=outcome == "dead")

    def _stop(self, origin: Origin, peer: Peer, message: Stop, now: float) -> None:
        self.state.event(f"{peer.name} stops the run: {message.reason}")
        self.ending.begin(message.reason, now, asked=True)
        self.outbox.reply(origin, Ack())

    def _status(self, origin: Origin, peer: Peer, query: StatusQuery, now: float) -> None:
        waits = self.learner.waiting_since(now)
        status = snapshot(
            self.state, self.ending, waits, now, groups=query.groups, evaluations=EVALUATIONS_SHOWN
        )
        self.outbox.reply(origin, Status(status=status))

    def _group(self, origin: Origin, peer: Peer, query: GroupQuery, now: float) -> None:
        view, payload = group_view(self.state, query.group)
        self.outbox.reply(origin, view, payload)

    def _ask_for_evaluation(self) -> None:
        ledger = self.state.ledger
        self.state.evaluations.at(ledger.version, final=ledger.finished)


def _taken(earlier: Peer, silence: float, limit_s: float) -> str:
    where = f"process {earlier.pid} on {earlier.host}, heard of {silence:.1f} s ago"
    if earlier.role == "learner":
        return (
            f"a learner is in the run already ({where}): stop that one, or wait until it has been silent for "
            f"{limit_s:.0f} s (broker.dead_after_s)"
        )
    return f"an actor called '{earlier.name}' is in the run ({where}): give this one another --name, or stop that one"
