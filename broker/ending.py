"""How a run ends: in order, and in bounded time.

Invariant: actors are told to stop first, the learner (which then writes its last checkpoint) when no actor is
left or their time is up, and the broker leaves last. When a person stops the run all of it takes at most
`STOP_S`; when the run is finished the broker waits for every living peer.
"""

from __future__ import annotations

from typing import Literal

from broker.members import Members

ACTORS_S = 3.0
STOP_S = 9.0
Command = Literal["run", "drain", "stop"]


class Ending:
    """The order of leaving. Times are on the broker's monotonic clock."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self.reason: str | None = None
        self.asked = False
        self._since = 0.0

    def begin(self, reason: str, now: float, *, asked: bool) -> None:
        """The run ends; `asked` when a person stops it, which bounds the wait."""
        if self.reason is None:
            self.reason, self.asked, self._since = reason, asked, now
        elif asked and not self.asked:
            self.asked, self._since = True, now

    def command(self, role: str, now: float) -> Command:
        """What a peer of this role is told at its next heartbeat."""
        if self.reason is None:
            return "run"
        return "stop" if role != "learner" or self._learner_may_go(now) else "run"

    def _learner_may_go(self, now: float) -> bool:
        if not self._members.living("actor"):
            return True
        return self.asked and now - self._since > ACTORS_S

    def over(self, now: float) -> bool:
        """Whether the broker may leave."""
        if self.reason is None:
            return False
        if self.asked and now - self._since > STOP_S:
            return True
        return not self._members.living("actor") and not self._members.living("learner")
