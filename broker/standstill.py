"""How long a run has stood still.

Invariant: progress is a committed version, a delivered group or an answered evaluation, nothing else: signs of
life are not progress. One standstill raises one alarm, however long it lasts. No clock of its own.
"""

from __future__ import annotations

from typing import Any


class Standstill:
    """How long the run has stood still; times are on the broker's monotonic clock.

    Args:
        limit_s: seconds without progress after which `look` raises the alarm (`broker.no_progress_s`).
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.alarms = 0
        self.stacks: str | None = None  # where the stacks of the standstill in force are
        self._mark: object = None
        self._since: float | None = None
        self._alarmed = False

    def look(self, mark: object, now: float, *, over: bool) -> bool:
        """True once per standstill: when `mark` has been the same for `limit_s`.

        Args:
            mark: what the run has got to.
            now: seconds.
            over: the run is ending or finished, and need not get any further.
        """
        if over or mark != self._mark or self._since is None:
            self._mark, self._since, self._alarmed, self.stacks = mark, now, False, None
            return False
        if self._alarmed or now - self._since < self.limit_s:
            return False
        self._alarmed = True
        self.alarms += 1
        return True

    @property
    def alarmed(self) -> bool:
        """Whether the run stands still now, and that has been said."""
        return self._alarmed

    def excuse(self, seconds: float) -> None:
        """The broker itself was not there for so long."""
        if self._since is not None:
            self._since += seconds

    def seconds(self, now: float) -> float:
        """Since the last progress."""
        return 0.0 if self._since is None else now - self._since

    def view(self, now: float) -> dict[str, Any]:
        """What `status` shows."""
        return {
            "seconds": round(self.seconds(now), 3),
            "limit_s": self.limit_s,
            "stalled": self._alarmed,
            "alarms": self.alarms,
            "stacks": self.stacks,
        }
