"""Rank 0's line to the broker: what must arrive arrives, in order, and training never waits for it.

Invariant: a posted message is sent again until the broker has answered it, and before any message posted after
it; an outage of the broker costs nothing but time (I4). A refusal, or whatever else ends the thread, is kept as
`failure` and ends the run.
Heartbeats go the same way; their answers bring the broker's command. They go on while a message waits for an answer
(the broker's disk is full, say): else nobody could stop the run.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from common.errors import RunFailedError, SlipstreamError
from common.messages import Goodbye, Heartbeat, Message, Pulse, Serve, Status, StatusQuery, WeightsAddress
from common.stacks import StackAnswers
from common.telemetry import Telemetry
from common.wire import BrokerUnreachable, Client, RefusedError

log = logging.getLogger("slipstream.learner")

ATTEMPT_S = 5.0
NAME_CHARS = 200  # of a `messages.Name`
GOODBYE_S = 2.0


class HistoryLost(SlipstreamError):  # noqa: N818 - a state of the world, not a defect
    """The broker stands elsewhere than we do; a restarted learner rewinds and goes on."""


class BrokerLink:
    """A thread that owns the control connection.

    Args:
        client: connected; shared with nobody who is in a hurry.
        heartbeat_s: seconds between signs of life.

    Attributes:
        version: the policy's, for the heartbeat.
        command, reason: what the broker wants, from its last answer.
        failure: why the run cannot go on.
        accuracy: held-out accuracy by version, as of the last `ask_accuracy`.
    """

    def __init__(self, client: Client, heartbeat_s: float) -> None:
        self._client = client
        self._weights: WeightsAddress | None = None
        self._heartbeat_s = heartbeat_s
        self._outbox: queue.Queue[Message] = queue.Queue()
        self._closing = threading.Event()
        self._asking = threading.Event()
        self._due = time.monotonic()  # the next heartbeat
        self._telemetry = Telemetry()
        self._stacks = StackAnswers()
        self._on_actors: Callable[[set[str]], None] = lambda living: None
        self._state: tuple[str, str | None, float] = ("starting", None, time.monotonic())
        self._meters: Callable[[], dict[str, float]] = dict
        self.version = 0
        self.command = "run"
        self.reason: str | None = None
        self.failure: Exception | None = None
        self.accuracy: dict[int, float] = {}
        self._thread = threading.Thread(target=self._run, name="broker-link", daemon=True)
        self._thread.start()

    def post(self, message: Message) -> None:
        """Hand over a message; returns at once."""
        self._outbox.put(message)

    def serve(self, weights: WeightsAddress) -> None:
        """Say where this learner serves weights, now and whenever the broker has forgotten."""
        self._weights = weights
        self.post(Serve(weights=weights))

    def be(self, state: str, waiting_for: str | None = None) -> None:
        """Say what the learner does; `waiting_for` names whom it waits for."""
        shown = waiting_for[:NAME_CHARS] if waiting_for else None
        self._state = (state, shown, time.monotonic())

    def moves(self, within_s: float) -> bool:
        """Whether the learner waits for somebody, or has done something else within the last `within_s` seconds."""
        _, waiting_for, since = self._state
        return waiting_for is not None or time.monotonic() - since < within_s

    def meter(self, read: Callable[[], dict[str, float]]) -> None:
        """Add `read()` to the telemetry of each heartbeat."""
        self._meters = read

    def follow_actors(self, tell: Callable[[set[str]], None]) -> None:
        """Call `tell` with the names of the actors in the run at each heartbeat, from this object's thread."""
        self._on_actors = tell

    def check(self) -> None:
        """Raise why the run cannot go on, if it cannot.

        Raises:
            RunFailedError: the broker refused what it must not refuse. HistoryLost: it forgot us.
            Exception: whatever else ended the thread.
        """
        if isinstance(self.failure, RefusedError):
            raise RunFailedError(f"the broker refused the learner: {self.failure}")
        if self.failure is not None:
            raise self.failure

    def flush(self, seconds: float) -> bool:
        """Wait until all that was posted is answered; False when `seconds` were not enough."""
        deadline = time.monotonic() + seconds
        while self._outbox.unfinished_tasks and self.failure is None:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return not self._outbox.unfinished_tasks

    def close(self, reason: str, flush_s: float) -> bool:
        """Deliver what is left, say goodbye, stop; False when something could not be delivered."""
        delivered = self.flush(flush_s)
        self._closing.set()
        self._thread.join(ATTEMPT_S + GOODBYE_S)
        if not self._thread.is_alive():
            try:
                self._client.request(Goodbye(reason=reason), timeout_s=GOODBYE_S)
            except (BrokerUnreachable, RefusedError) as error:
                log.info("the broker did not hear our goodbye: %s", error)
            self._client.close()
        return delivered

    # --- the thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:  # raised by `check` in the training loop: nothing else would notice
            log.exception("the learner's line to the broker broke")
            self.failure = error

    def _work(self) -> None:
        while not self._closing.is_set() and self.failure is None:
            try:
                message = self._outbox.get(timeout=max(0.0, min(0.2, self._due - time.monotonic())))
            except queue.Empty:
                message = None
            if message is not None:
                self._deliver(message)
                self._outbox.task_done()
            if self._beat_when_due():
                self._ask_status()

    def _beat_when_due(self) -> bool:
        if time.monotonic() < self._due:
            return False
        self._due = time.monotonic() + self._heartbeat_s
        self._beat()
        return True

    def _deliver(self, message: Message) -> None:
        while not self._closing.is_set() and self.failure is None:
            try:
                self._take_in(self._client.request(message, timeout_s=ATTEMPT_S).message)
                return
            except BrokerUnreachable as error:
                log.warning("%s; the learner keeps it and tries again", error)
            except RefusedError as error:
                if error.code != "full":
                    log.error("the broker refused %s: %s", message.kind, error)
                    self.failure = error
                    return
                log.warning("%s; the learner keeps %s and tries again", error, message.kind)
                self._closing.wait(1.0)
            self._beat_when_due()

    def _beat(self) -> None:
        state, waiting_for, since = self._state
        era = 0 if self._weights is None else self._weights.era
        try:
            meters = self._telemetry.sample() | self._meters()
            beat = Heartbeat(
                state=state,
                waiting_for=waiting_for,
                waiting_s=time.monotonic() - since if waiting_for else 0.0,
                version=self.version,
                era=era,
                telemetry=meters,
                time=time.time(),
            )
            self._take_in(self._client.request(beat, timeout_s=ATTEMPT_S).message)
        except (BrokerUnreachable, RefusedError) as error:
            log.warning("heartbeat: %s", error)
            if isinstance(error, RefusedError) and error.code == "not_now":  # another learner is in our place
                self.failure = error

    def _ask_status(self) -> None:
        """A wish, not a message that must arrive: a commit shall never wait behind it for long."""
        if not self._asking.is_set():
            return
        self._asking.clear()
        try:
            self._take_in(self._client.request(StatusQuery(), timeout_s=ATTEMPT_S).message)
        except (BrokerUnreachable, RefusedError) as error:
            log.warning("the broker did not say what the evaluations found: %s", error)

    def _take_in(self, reply: Message) -> None:
        if isinstance(reply, Status):
            self.accuracy = dict(reply.status["accuracy"])
        elif isinstance(reply, Pulse):
            self.command, self.reason = reply.command, reply.reason
            self._compare(reply)
            if reply.actors is not None:
                self._on_actors(set(reply.actors))
            if request := self._stacks.wanted(reply):
                log.warning("the broker asks for stacks: the run makes no progress")
                # A help to people; the run does not hang on it.
                with suppress(BrokerUnreachable, RefusedError):
                    self._client.request(self._stacks.answer(request), timeout_s=ATTEMPT_S)

    def _compare(self, pulse: Pulse) -> None:
        weights = self._weights
        if weights is None:
            return
        if pulse.era != weights.era:
            self.failure = HistoryLost(
                f"the broker is in era {pulse.era} and the learner in {weights.era}: the broker lost its history, or "
                "another learner came"
            )
        elif pulse.weights != weights and not self._outbox.unfinished_tasks:
            self.post(Serve(weights=weights))

    def ask_accuracy(self) -> None:
        """Ask for the evaluations so far, once; `accuracy` has them when the answer is in."""
        self._asking.set()


class RankLink:
    """Heartbeats of a rank that does not lead: the broker can ask it for its stacks; nothing else hangs on it.

    Args:
        client: a connection of its own, as an observer.
        heartbeat_s: seconds between signs of life.
    """

    def __init__(self, client: Client, heartbeat_s: float) -> None:
        self._client, self._heartbeat_s = client, heartbeat_s
        self._stacks = StackAnswers()
        threading.Thread(target=self._run, name="rank-link", daemon=True).start()

    def _run(self) -> None:
        while True:
            with suppress(BrokerUnreachable, RefusedError):
                beat = Heartbeat(state="rank of the learner", time=time.time())
                pulse = self._client.request(beat, timeout_s=ATTEMPT_S).message
                if isinstance(pulse, Pulse) and (request := self._stacks.wanted(pulse)):
                    self._client.request(self._stacks.answer(request), timeout_s=ATTEMPT_S)
            time.sleep(self._heartbeat_s)
