"""Holds commits back while an evaluation is in flight, so that it is scored by one version throughout.

Invariant: no commit happens while any holder is inside; once a commit waits, new holders wait for it, so that
evaluations that overlap one another cannot postpone it for ever. Holders must not nest.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class CommitGate:
    """Many holders or one commit; commits go first."""

    def __init__(self) -> None:
        self._condition = asyncio.Condition()
        self._holders = 0
        self._commits = 0  # waiting or under way

    @property
    def held(self) -> bool:
        return self._holders > 0

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[None]:
        async with self._condition:
            await self._condition.wait_for(lambda: self._commits == 0)
            self._holders += 1
        try:
            yield
        finally:
            async with self._condition:
                self._holders -= 1
                self._condition.notify_all()

    @asynccontextmanager
    async def commit(self) -> AsyncIterator[None]:
        self._commits += 1
        try:
            async with self._condition:
                await self._condition.wait_for(lambda: self._holders == 0)
            yield
        finally:
            self._commits -= 1
            async with self._condition:
                self._condition.notify_all()
