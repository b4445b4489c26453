"""The books of the ledger: every group in its place, counted, and the one way from place to place.

Invariant (I3): every lease ever granted is in exactly one place:
leased = in flight + buffered + taken + consumed + filtered + expired + abandoned. The unit of the sum is the
*lease*, not the question: a lease that is lost counts as `expired` (too stale) or `abandoned(reason)` for good,
while its question goes back to pending and is leased again under the next number. A *question* is given up (state
ABANDONED) only after `max_attempts` lost leases, or if it cannot be answered.

`_move` is the only place where a group changes; it keeps the indices by state, by deadline and by actor, and notes
in `dirty` and `discarded` what the store must learn at its next save, which clears them.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from typing import Any, Self

from broker import staleness
from broker.group import IN_BUFFER, Group, Rules, State
from common.messages import GroupId


class Books:
    """Where every group is and where the run stands; see the module's docstring."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.step = 0
        self.era = 0
        self.forks: list[int] = []  # version that era i + 1 was rewound to
        self.fresh_era = False  # nothing was taken or committed since the last rewind
        self.granted = 0
        self.expired = 0
        self.abandoned: Counter[str] = Counter()
        self.frontier = (0, 0)  # epoch and position of the first question never leased
        self.groups: dict[GroupId, Group] = {}
        self.taken: dict[int, list[Group]] = {}
        self.states: Counter[State] = Counter()
        self.dirty: set[GroupId] = set()
        self.discarded: list[GroupId] = []  # published groups that nobody will ask for again
        self._again: list[tuple[int, int, GroupId]] = []  # heap of questions to be leased again
        self._due: Counter[int] = Counter()  # groups not taken, by deadline
        self._ready: dict[GroupId, Group] = {}  # what a step may take: buffered, or filtered and counted
        self._leased: dict[GroupId, Group] = {}
        self._held: Counter[str] = Counter()  # leases by actor

    # --- where the run stands -----------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Newest version: commits since the base model in the surviving history."""
        return self.step

    @property
    def next_step(self) -> int:
        """First step whose groups are not taken."""
        return self.step + len(self.taken)

    @property
    def untaken(self) -> int:
        """Groups in flight or buffered that some step will take."""
        return len(self._leased) + len(self._ready)

    @property
    def leased(self) -> Iterable[Group]:
        """Groups in flight."""
        return self._leased.values()

    @property
    def remaining(self) -> int:
        """Questions that can still be trained on: not yet taken, filtered or abandoned."""
        epoch, position = self.frontier
        unseen = (self.rules.max_epochs - epoch) * self.rules.questions - position
        return max(0, unseen) + self.states[State.PENDING] + self.untaken

    @property
    def last_step(self) -> int:
        """Last step of the run: by `run.steps`, or earlier where the questions of `data.max_epochs` run out.

        A last step that cannot be filled is not taken: the gradient's normaliser stays what it was (I5).
        """
        return min(self.rules.steps, self.next_step + self.remaining // self.rules.groups_per_step) - 1

    @property
    def finished(self) -> bool:
        """Whether the last step is committed."""
        return not self.taken and self.step > self.last_step

    def exists(self, era: int, version: int) -> bool:
        """Whether (era, version) names a policy of the surviving history."""
        if era > self.era:
            return False
        limit = min(self.forks[era:], default=self.version)
        return version <= min(limit, self.version)

    # --- transitions: every change of a group goes through here -------------------------------------------

    def _deadline(self, group: Group) -> int:
        return staleness.deadline(group.oldest, self.rules.max_staleness)

    def _counts_in_a_step(self, group: Group) -> bool:
        if group.state == State.FILTERED:
            return group.step < 0 and self.rules.zero_variance == "count"
        return group.state == State.BUFFERED

    def _enter(self, group: Group) -> None:
        self.groups[group.key] = group
        self.states[group.state] += 1
        if group.state == State.LEASED:
            self._leased[group.key] = group
            self._held[group.actor] += 1
            self._due[self._deadline(group)] += 1
        elif self._counts_in_a_step(group):
            self._ready[group.key] = group
            self._due[self._deadline(group)] += 1
        elif group.state == State.PENDING:
            heapq.heappush(self._again, (*group.order, group.key))

    def _leave(self, group: Group) -> None:
        self.states[group.state] -= 1
        if group.state == State.LEASED:
            self._held[group.actor] -= 1
            if not self._held[group.actor]:
                del self._held[group.actor]
        waiting = self._leased.pop(group.key, None) or self._ready.pop(group.key, None)
        if waiting is not None:
            when = self._deadline(group)
            self._due[when] -= 1
            if not self._due[when]:
                del self._due[when]

    def _move(self, group: Group, state: State, **changes: Any) -> None:
        if group.key in self.groups:
            self._leave(group)
        if group.state in IN_BUFFER and state not in IN_BUFFER:
            self.discarded.append(group.key)
        group.state = state
        for name, value in changes.items():
            setattr(group, name, value)
        self._enter(group)
        self.dirty.add(group.key)

    def _put_back(self, group: Group, *, reason: str | None) -> None:
        """End the lease of `group` as abandoned (or expired, without a reason); its question is pending again."""
        if reason is None:
            self.expired += 1
        else:
            self.abandoned[reason] += 1
        self._move(group, State.PENDING, actor="", step=-1)

    def _lose(self, group: Group, reason: str) -> None:
        """A lease came to nothing and it may be the question's fault: give it up after `max_attempts`."""
        group.failures += 1
        if group.failures < self.rules.max_attempts:
            self._put_back(group, reason=reason)
        else:
            self._give_up(group, reason)

    def _give_up(self, group: Group, reason: str) -> None:
        self.abandoned[reason] += 1
        self._move(group, State.ABANDONED, actor="", step=-1)

    # --- books ---------------------------------------------------------------------------------------------

    def counts(self) -> dict[str, Any]:
        """The sum of I3, in leases; `sum_ok` says whether it adds up, `questions` counts questions by state."""
        states = self.states
        parts = {
            "in_flight": states[State.LEASED],
            "buffered": states[State.BUFFERED],
            "taken": states[State.TAKEN],
            "consumed": states[State.CONSUMED],
            "filtered": states[State.FILTERED],
            "expired": self.expired,
            "abandoned": self.abandoned.total(),
        }
        return {
            "leased": self.granted,
            **parts,
            "sum_ok": self.granted == sum(parts.values()),
            "abandoned_reasons": dict(self.abandoned),
            "questions": {
                "seen": len(self.groups),
                "pending_again": states[State.PENDING],
                "given_up": states[State.ABANDONED],
                "remaining": self.remaining,
            },
        }

    def meta(self) -> dict[str, Any]:
        """Everything but the groups, for the journal (plain types)."""
        return {
            "step": self.step,
            "era": self.era,
            "forks": list(self.forks),
            "fresh_era": self.fresh_era,
            "granted": self.granted,
            "expired": self.expired,
            "abandoned": dict(self.abandoned),
            "frontier": list(self.frontier),
        }

    @classmethod
    def restore(cls, rules: Rules, meta: dict[str, Any], groups: Iterable[Group]) -> Self:
        """The ledger as it was saved."""
        ledger = cls(rules)
        ledger.step, ledger.era = meta["step"], meta["era"]
        ledger.forks, ledger.fresh_era = list(meta["forks"]), meta["fresh_era"]
        ledger.granted, ledger.expired = meta["granted"], meta["expired"]
        ledger.abandoned = Counter(meta["abandoned"])
        epoch, position = meta["frontier"]
        ledger.frontier = (epoch, position)
        for group in groups:
            ledger._enter(group)
            if group.step >= ledger.step and group.state in (State.TAKEN, State.FILTERED):
                ledger.taken.setdefault(group.step, []).append(group)
        for taken in ledger.taken.values():
            taken.sort(key=lambda group: group.order)
        return ledger
