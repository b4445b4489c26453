"""Signs of life, and what the broker says in return.

Invariant: the heart beats whatever the engine does, also while it drains; an outage of the broker is waited for
and said, never an error. Under systemd an engine that hangs silences the watchdog, not the heart. A heart that
is kept from beating (a blocked event loop) leaves the actor's stacks on standard error.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from common.messages import Heartbeat, Pulse
from common.stacks import StackAnswers, of_tasks
from common.systemd import Progress, Watchdog, notify_ready
from common.wire import AsyncClient, BrokerUnreachable, RefusedError

log = logging.getLogger("slipstream.actor.heart")

STALLED_S = 900.0  # an engine that samples no token for so long, and waits for nobody, is hung


class Heart:
    """Sends a heartbeat every `interval_s` seconds, and at once after `soon`.

    Args:
        wire: connection to the broker.
        interval_s: seconds between heartbeats.
        describe: the next heartbeat.
        on_pulse: called with every answer.
        mark: how far the engine has got; what equals the one before is no progress. A group or an evaluation may take
            longer than any limit, so that only single tokens and answers will do.
        blocked_s: seconds without a beat after which all stacks go to standard error.
    """

    def __init__(
        self,
        wire: AsyncClient,
        interval_s: float,
        describe: Callable[[], Heartbeat],
        on_pulse: Callable[[Pulse], Awaitable[None]],
        mark: Callable[[], object],
        blocked_s: float = STALLED_S,
    ) -> None:
        self._wire, self._interval_s = wire, interval_s
        self._describe, self._on_pulse, self._mark = describe, on_pulse, mark
        self._progress = Progress(STALLED_S)
        self._watchdog = Watchdog(self._progress)
        self._ready = False
        self._blocked_s = blocked_s
        self._stacks = StackAnswers()
        self._answering: asyncio.Task[None] | None = None
        self._soon = asyncio.Event()

    async def beat(self) -> None:
        """Beat until cancelled.

        Raises:
            RefusedError: the broker has shut this actor out, or serves another run now.
        """
        try:
            while True:
                faulthandler.dump_traceback_later(self._blocked_s, repeat=True)
                await self._beat_once()
                self._watchdog.beat()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._soon.wait(), self._interval_s)
                self._soon.clear()
        finally:
            faulthandler.cancel_dump_traceback_later()

    def soon(self) -> None:
        """Something has changed that the broker should not learn an interval later; on the event loop only."""
        self._soon.set()

    async def _beat_once(self) -> None:
        beat = self._describe()
        self._progress.note(self._mark(), waiting=beat.waiting_for is not None)
        try:
            reply = await self._wire.request(beat, timeout_s=10 + self._interval_s)
        except BrokerUnreachable as error:
            log.warning("%s; work in hand is kept", error)
            return
        assert isinstance(reply.message, Pulse)
        await self._on_pulse(reply.message)
        if request := self._stacks.wanted(reply.message):
            self._answering = asyncio.create_task(self._answer(request), name="stacks")
        if not self._ready:
            notify_ready()
            self._ready = True

    async def _answer(self, request: str) -> None:
        """Send the stacks of this process, of its tasks and of its engine; takes a second for each frozen child."""
        log.warning("the broker asks for stacks: the run makes no progress")
        try:
            stacks = await asyncio.to_thread(self._stacks.answer, request, of_tasks())
            await self._wire.request(stacks)
        except (BrokerUnreachable, RefusedError) as error:
            log.warning("the stacks could not be sent: %s", error)
