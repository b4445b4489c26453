"""How a run ends: in order, and in bounded time.

Invariant: the broker leaves last. When a person stops the run, actors are told first, the learner when no actor is
left or their time is up. It then finishes its step and writes its last checkpoint, which for a large model takes
minutes: the broker stays for as long as the learner shows signs of life. For all others the end is bounded by
`STOP_S`: for actors, and for a learner that is still loading and has nothing to save. When the run is
finished, the learner goes first and actors stay until it has left in peace: if it dies while it writes its last
checkpoint, it comes back, rewinds, and finds them at work.
"""

from __future__ import annotations

from typing import Literal

from broker.members import LEFT, Members

ACTORS_S = 3.0
STOP_S = 9.0
NOTHING_TO_SAVE = ("joining", "starting")  # states of a learner that has not begun to train
Command = Literal["run", "drain", "stop"]


class Ending:
    """The order of leaving. Times are on the broker's monotonic clock.

    Args:
        members: who is still there.
        patience_s: how long a finished run waits for a learner that died to come back.
    """

    def __init__(self, members: Members, patience_s: float) -> None:
        self._members, self._patience_s = members, patience_s
        self.reason: str | None = None
        self.asked = False
        self._since = 0.0

    def begin(self, reason: str, now: float, *, asked: bool) -> None:
        """The run ends; `asked` when a person stops it, which bounds the wait."""
        if self.reason is None or (asked and not self.asked):
            self.reason, self.asked, self._since = self.reason or reason, asked, now

    def cancel(self) -> None:
        """The run is not finished after all: the learner went back to an earlier checkpoint."""
        if not self.asked:
            self.reason = None

    def command(self, role: str, now: float) -> Command:
        """What a peer of this role is told at its next heartbeat."""
        if self.reason is None:
            return "run"
        may_go = {"learner": self._learner_may_go, "actor": self._actors_may_go}.get(role)
        return "stop" if may_go is None or may_go(now) else "run"

    def _learner_may_go(self, now: float) -> bool:
        if not self.asked:
            return True
        return not self._members.living_actors or now - self._since > ACTORS_S

    def _actors_may_go(self, now: float) -> bool:
        if self.asked:
            return True
        learners = [peer for peer in self._members.peers.values() if peer.role == "learner"]
        if any(peer.alive for peer in learners):
            return False
        in_peace = any(peer.farewell.startswith(LEFT) for peer in learners)
        return in_peace or now - self._since > self._patience_s

    def _learner_has_work(self) -> bool:
        return any(peer.state not in NOTHING_TO_SAVE for peer in self._members.living("learner"))

    def over(self, now: float) -> bool:
        """Whether the broker may leave."""
        if self.reason is None:
            return False
        if self.asked and now - self._since > STOP_S and not self._learner_has_work():
            return True
        if self._members.living_actors or self._members.living("learner"):
            return False
        return self.asked or self._actors_may_go(now)
