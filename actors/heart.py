"""Signs of life, and what the broker says in return.

Invariant: the heart beats whatever the engine does, also while it drains; an outage of the broker is waited for
and said, never an error. Under systemd an engine that hangs silences the watchdog, not the heart.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from common.messages import Heartbeat, Pulse
from common.systemd import Progress, Watchdog, notify_ready
from common.wire import AsyncClient, BrokerUnreachable

log = logging.getLogger("slipstream.actor.heart")

STALLED_S = 900.0  # an engine that finishes no group for so long, and waits for nobody, is hung


class Heart:
    """Sends a heartbeat every `interval_s` seconds.

    Args:
        wire: connection to the broker.
        interval_s: seconds between heartbeats.
        describe: the next heartbeat.
        on_pulse: called with every answer.
    """

    def __init__(
        self,
        wire: AsyncClient,
        interval_s: float,
        describe: Callable[[], Heartbeat],
        on_pulse: Callable[[Pulse], Awaitable[None]],
    ) -> None:
        self._wire, self._interval_s = wire, interval_s
        self._describe, self._on_pulse = describe, on_pulse
        self._progress = Progress(STALLED_S)
        self._watchdog = Watchdog(self._progress)
        self._ready = False

    async def beat(self) -> None:
        """Beat until cancelled.

        Raises:
            RefusedError: the broker has shut this actor out, or serves another run now.
        """
        while True:
            try:
                beat = self._describe()
                tokens = beat.telemetry.get("generated_tokens")
                self._progress.note(tokens, waiting=beat.waiting_for is not None)
                reply = await self._wire.request(beat, timeout_s=10 + self._interval_s)
                assert isinstance(reply.message, Pulse)
                await self._on_pulse(reply.message)
                if not self._ready:
                    notify_ready()
                    self._ready = True
            except BrokerUnreachable as error:
                log.warning("%s; work in hand is kept", error)
            self._watchdog.beat()
            await asyncio.sleep(self._interval_s)
