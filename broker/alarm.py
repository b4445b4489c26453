"""The no-progress watchdog: notices a standstill, says what it knows, asks for everybody's stacks.

Invariant: once per standstill, in the log, among the events, in the status and on the metrics page alike.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from broker.ending import Ending
from broker.explain import duration, explain
from broker.members import Peer
from broker.stack_collection import StackCollection
from broker.state import RunState
from broker.status import snapshot
from common.messages import Stacks

log = logging.getLogger("slipstream.broker")

ANSWERS_S = 5.0  # beyond two heartbeats: who has not sent its stacks by then is asked by signal
CAUSES_SAID = 4


class Alarm:
    """Watches a run.

    Args:
        state: of the run.
        ending: whether it is ending.
        learner_waits_s: seconds that the learner has been waiting for groups, as of a time, or None.
    """

    def __init__(
        self, state: RunState, ending: Ending, learner_waits_s: Callable[[float], float | None]
    ) -> None:
        self._state, self._ending, self._learner_waits_s = state, ending, learner_waits_s
        self._collection: StackCollection | None = None

    @property
    def request(self) -> str | None:
        """What the reply to a heartbeat asks for (`Pulse.dump_stacks`)."""
        return self._collection.request if self._collection is not None else None

    def tick(self, now: float) -> None:
        """Look once; `now` is on the broker's monotonic clock."""
        state = self._state
        over = self._ending.reason is not None or state.over
        if state.standstill.look(self._mark(), now, over=over):
            self._raise(now)
        if self._collection is not None:
            for sentence in self._collection.tick(now):
                self._say(sentence)

    def _mark(self) -> tuple[int, ...]:
        ledger, state = self._state.ledger, self._state
        return (
            ledger.era,
            ledger.version,
            state.meters.lengths["sampled"].count,
            len(state.evaluations.results),
        )

    def _raise(self, now: float) -> None:
        state = self._state
        status = snapshot(state, self._ending, self._learner_waits_s(now), now)
        causes = [str(cause) for cause in explain(status | {"no_progress": {"stalled": False}})][:CAUSES_SAID]
        living = [peer for peer in state.members.living() if _reports(peer)]
        lost = [p for p in state.members.peers.values() if not p.alive and p.farewell.startswith("dead")]
        self._collection = StackCollection(
            state.folder,
            [(peer.name, peer.host, peer.pid) for peer in [*living, *lost]],
            [peer.name for peer in lost],
            now + ANSWERS_S + 2 * state.recipe.broker.heartbeat_s,
        )
        state.standstill.stacks = f"{self._collection.prefix}-*.txt"
        self._say(
            f"no progress for {duration(state.standstill.seconds(now))}: {'; '.join(causes) or 'nobody waits'}; "
            f"stacks of every process go to {state.standstill.stacks}"
        )

    def answered(self, peer: Peer, message: Stacks) -> None:
        """A peer sends its stacks."""
        if self._collection is not None:
            self._collection.answered(peer.name, message.request, message.text)

    def _say(self, text: str) -> None:
        log.warning("%s", text)
        self._state.event(text, warning=True)


def _reports(peer: Peer) -> bool:
    """Whether a peer sends heartbeats: workers do, a person who looks at the status does not."""
    return peer.role != "observer" or peer.state != "joining"
