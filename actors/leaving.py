"""Orders to leave, from signals and from the broker.

Invariant: the first order stands until a stop overtakes it; a second signal is a stop. An order is carried out
once, by whoever awaits `ordered`.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable
from typing import Literal, NamedTuple

log = logging.getLogger("slipstream.actor")

DRAIN_S = 20.0  # after a signal: below the 30 s that Slurm grants before it kills
Way = Literal["drain", "stop"]


class Order(NamedTuple):
    """How to leave, how long that may take (seconds), and why."""

    way: Way
    deadline_s: float
    reason: str


class Leaving:
    """Collects orders. `way` is the one in force, None while the actor stays."""

    def __init__(self) -> None:
        self.way: Way | None = None
        self._orders: asyncio.Queue[Order] = asyncio.Queue()

    def hear_signals(self) -> None:
        """SIGTERM and Ctrl-C drain; a second one of either stops."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, signal.Signals(number).name)

    def _on_signal(self, name: str) -> None:
        if self.way is None:
            self.drain(DRAIN_S, name)
        else:
            self.stop(f"{name} again")

    def drain(self, deadline_s: float, reason: str) -> None:
        """Finish what is in hand within `deadline_s`, unless an order stands already."""
        if self.way is None:
            self._order(Order("drain", deadline_s, reason))

    def stop(self, reason: str) -> None:
        """Leave at once."""
        if self.way != "stop":
            self._order(Order("stop", 0.0, reason))

    def _order(self, order: Order) -> None:
        self.way = order.way
        log.info("%s: %s", order.way, order.reason)
        self._orders.put_nowait(order)

    async def ordered(self, drain: Callable[[Order], Awaitable[None]]) -> Way:
        """Wait for an order and carry it out with `drain`; returns the way that was taken in the end.

        Raises:
            Exception: whatever `drain` raises.
        """
        order = await self._orders.get()
        if order.way == "stop":
            return "stop"
        draining = asyncio.ensure_future(drain(order))
        overtaken = asyncio.ensure_future(self._orders.get())
        try:
            await asyncio.wait({draining, overtaken}, return_when=asyncio.FIRST_COMPLETED)
            if not draining.done():
                return "stop"
            draining.result()
            return "drain"
        finally:
            draining.cancel()
            overtaken.cancel()
