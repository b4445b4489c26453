"""The prompt ledger: which question is where, as a state machine without I/O.

    pending -> leased -> buffered -> taken(step) -> consumed(step)
                  |          |
                  |          +-> pending again      (lease expired: too stale; rewound; its payload was damaged)
                  +-> filtered(step)                (zero variance: counted in N or replaced, never sent)
                  +-> pending again or abandoned    (lease lost, handed back, void)

Invariants, each with a test:

* I2: a question of an epoch is consumed at one step of the surviving history, or filtered, or abandoned with its
  reason. A lease that is void never changes anything; the same publication twice counts once.
* I3: nothing vanishes; `broker.books` keeps the sum.
* I1: by `broker.staleness`; `sweep` is the hard guarantee.

Policies are named (era, version). Step s trains on version s and its commit makes version s + 1. A rewind to
step s opens a new era in which versions up to s live on and later ones are gone.

The clock is passed in (seconds, any origin).
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable

from broker import staleness
from broker.books import Books
from broker.group import ARRIVED, IN_A_STEP, Facts, Group, LedgerError, Published, Reopened, State
from broker.order import epoch_order
from common.messages import Cause, GroupId


class Ledger(Books):
    """See the module's docstring. Not thread-safe: the broker's loop is its only caller."""

    def room(self, version: int) -> int:
        """Groups that an actor at `version` may be leased now (I1 by admission)."""
        free = staleness.room(
            self._due,
            version=version,
            next_step=self.next_step,
            last_step=self.last_step,
            groups_per_step=self.rules.groups_per_step,
            max_staleness=self.rules.max_staleness,
        )
        return min(free, self.remaining - self.untaken)

    def held_by(self, actor: str) -> int:
        """Groups in flight at an actor."""
        return self._held[actor]

    # --- leases --------------------------------------------------------------------------------------------

    def _next_question(self) -> Group | None:
        while self._again:
            *_, key = heapq.heappop(self._again)
            group = self.groups[key]
            if group.state == State.PENDING:
                return group
        epoch, position = self.frontier
        if epoch >= self.rules.max_epochs:
            return None
        index = int(epoch_order(self.rules.seed, epoch, self.rules.questions)[position])
        over = position + 1 == self.rules.questions
        self.frontier = (epoch + 1, 0) if over else (epoch, position + 1)
        return Group(GroupId(epoch, index), position)

    def lease(self, actor: str, capacity: int, *, era: int, version: int, now: float) -> list[Group]:
        """Lease up to `capacity` groups to an actor at (era, version); none where admission forbids it."""
        if not self.exists(era, version):
            return []
        granted = []
        for _ in range(min(capacity, self.room(version))):
            group = self._next_question()
            if group is None:
                break
            self.granted += 1
            self._move(
                group,
                State.LEASED,
                lease=group.lease + 1,
                actor=actor,
                era=era,
                oldest=version,
                newest=version,
                step=-1,
                granted=now,
                renewed=now,
            )
            granted.append(group)
        return granted

    def renew(self, actor: str, keys: Iterable[GroupId], now: float) -> None:
        """The actor says that it still works on these groups."""
        for key in keys:
            group = self._leased.get(key)
            if group is not None and group.actor == actor:
                group.renewed = now

    def release(self, actor: str, keys: Iterable[GroupId], reason: str, cause: Cause = "failed") -> int:
        """Hand leases back; what becomes of their questions depends on the cause (see `messages.Release`)."""
        held = [
            group
            for key in dict.fromkeys(keys)
            if (group := self._leased.get(key)) is not None and group.actor == actor
        ]
        for group in held:
            if cause == "unanswerable":
                self._give_up(group, f"unanswerable: {reason[:200]}")
            elif cause == "leaving":
                self._put_back(group, reason="handed back")
            else:
                self._lose(group, "handed back")
        return len(held)

    def drop_actor(self, actor: str, reason: str) -> int:
        """The actor is gone, dead or restarted: its leases come to nothing, and one of them may have killed it."""
        lost = [group for group in self._leased.values() if group.actor == actor]
        for group in lost:
            self._lose(group, reason)
        return len(lost)

    def tick(self, now: float, alive: Callable[[str], bool]) -> list[Group]:
        """End leases that ran out; returns them.

        A lease ends `lease_s` after its last sign of life, `lease_max_s` after its grant in any case (I4), or when
        a living actor has not listed it for `unlisted_s`: then the grant never reached it.
        """
        over = [group for group in self._leased.values() if self._ran_out(group, now, alive)]
        for group in over:
            self._lose(group, "lease ran out")
        return over

    def _ran_out(self, group: Group, now: float, alive: Callable[[str], bool]) -> bool:
        silent = now - group.renewed
        unlisted = silent > self.rules.unlisted_s and alive(group.actor)
        return silent > self.rules.lease_s or now - group.granted > self.rules.lease_max_s or unlisted

    def excuse(self, seconds: float) -> None:
        """The broker was not listening for so long: no lease is older for it."""
        for group in self._leased.values():
            group.granted += seconds
            group.renewed += seconds

    def restart_clocks(self, now: float) -> None:
        """After a restart of the broker: leases live on, their time starts anew."""
        for group in self._leased.values():
            group.granted = group.renewed = now

    # --- publication ---------------------------------------------------------------------------------------

    def publish(self, facts: Facts) -> Published:
        """A scored group arrives. Anything but accepted / filtered leaves no group in the buffer."""
        group = self.groups.get(facts.key)
        if group is None or facts.lease > group.lease:
            return Published("unknown", f"group {facts.key} has no lease {facts.lease}")
        if facts.lease == group.lease and group.state in ARRIVED:
            return Published("duplicate")
        if facts.lease < group.lease or group.state != State.LEASED:
            return Published("expired", f"lease {facts.lease} of group {facts.key} is void")
        if facts.actor != group.actor:
            return Published("unknown", f"group {facts.key} is leased to {group.actor}")
        if not self.exists(facts.era, facts.newest):
            if facts.era == self.era:
                return Published("future", f"version {facts.newest} is not committed yet")
            return self._refuse(group, "rewound", "sampled by versions that were rewound")
        if staleness.expired(facts.oldest, self.next_step, self.rules.max_staleness):
            return self._refuse(
                group, None, f"sampled by version {facts.oldest}, too old for step {self.next_step}"
            )
        return self._accept(group, facts)

    def _refuse(self, group: Group, outcome: str | None, reason: str) -> Published:
        self._put_back(group, reason=outcome)
        return Published("expired", reason)

    def _accept(self, group: Group, facts: Facts) -> Published:
        filtered = facts.zero_variance and self.rules.zero_variance != "train"
        self._move(
            group,
            State.FILTERED if filtered else State.BUFFERED,
            era=facts.era,
            oldest=facts.oldest,
            newest=facts.newest,
            reward=facts.reward,
            tokens=facts.tokens,
        )
        return Published("filtered" if filtered else "accepted")

    # --- steps ---------------------------------------------------------------------------------------------

    def sweep(self) -> list[GroupId]:
        """Expire what `next_step` may no longer train on; the hard guarantee of I1. Returns what was dropped."""
        stale = [
            group
            for group in self._ready.values()
            if group.state == State.BUFFERED
            and staleness.expired(group.oldest, self.next_step, self.rules.max_staleness)
        ]
        for group in stale:
            self._put_back(group, reason=None)
        return [group.key for group in stale]

    def take(self, step: int) -> list[Group] | None:
        """The groups of `step`, in the order of the questions; None: not there yet (see `missing`).

        Oldest deadline first. Filtered groups hold a place where `zero_variance` is `count`. A step may be taken
        while the one before it is not committed. The same step again gives the same groups.

        Raises:
            LedgerError: the step is already committed (`stale`) or its turn has not come (`not_now`).
        """
        if step in self.taken:
            return self.taken[step]
        if step < self.step:
            raise LedgerError("stale", f"step {step} is committed; the next one is {self.step}")
        if step != self.next_step or step > self.step + 1:
            raise LedgerError("not_now", f"step {step} was asked for before step {self.next_step} was taken")
        self.sweep()
        chosen = self._choose()
        if chosen is None:
            return None
        for group in chosen:
            state = State.FILTERED if group.state == State.FILTERED else State.TAKEN
            self._move(group, state, step=step)
        self.taken[step] = sorted(chosen, key=lambda group: group.order)
        self.fresh_era = False
        return self.taken[step]

    def _choose(self) -> list[Group] | None:
        wanted = self.rules.groups_per_step
        if len(self._ready) < wanted or self.next_step > self.last_step:
            return None
        # The oldest token has the earliest deadline; then the order of the questions.
        by_deadline = sorted(self._ready.values(), key=lambda group: (group.oldest, group.order))
        chosen = by_deadline[:wanted]
        left = self._due - Counter(self._deadline(group) for group in chosen)
        in_flight = Counter(self._deadline(group) for group in self._leased.values())
        return chosen if staleness.leaves_feasible(left, in_flight, self.next_step, wanted) else None

    def missing(self) -> tuple[int, list[Group]]:
        """What `next_step` waits for: groups still lacking, and leases that must not be overtaken."""
        lacking = max(0, self.rules.groups_per_step - len(self._ready))
        urgent = min((self._deadline(group) for group in self._leased.values()), default=None)
        return lacking, [group for group in self._leased.values() if self._deadline(group) == urgent]

    def commit(self, step: int, version: int) -> list[Group]:
        """Step done: its groups are consumed. Returns them; empty when it was committed before.

        Raises:
            LedgerError: not the step in hand (`conflict`, `stale`).
        """
        if version != step + 1:
            raise LedgerError("conflict", f"step {step} makes version {step + 1}, not {version}")
        if step == self.step - 1:
            return []
        if step < self.step:
            raise LedgerError("stale", f"step {step} is committed; the next one is {self.step}")
        if step not in self.taken:
            raise LedgerError("conflict", f"step {step} was not taken")
        if step != self.step:
            raise LedgerError("conflict", f"step {self.step} must be committed before step {step}")
        groups = self.taken.pop(step)
        for group in groups:
            self._move(group, State.FILTERED if group.state == State.FILTERED else State.CONSUMED)
        self.step += 1
        self.fresh_era = False
        if self.finished:
            self.close()
        return groups

    def untake(self, step: int) -> None:
        """A step could not be given after all: its groups, and those of later steps, are in the buffer again."""
        for taken in sorted(later for later in self.taken if later >= step):
            for group in self.taken.pop(taken):
                back = State.FILTERED if group.state == State.FILTERED else State.BUFFERED
                self._move(group, back, step=-1)

    def lose(self, keys: Iterable[GroupId]) -> None:
        """The payload of these groups is lost: where a step would still train on it, the question is asked again.

        A group that is taken stays so: the learner may have it already.
        """
        for key in keys:
            if (group := self.groups[key]).state == State.BUFFERED:
                self._put_back(group, reason="damaged")

    def catch_up(self, step: int) -> list[Group]:
        """A checkpoint of `step` is there: commit the taken steps before it, whose commits were lost on the way.

        The take was durable before the learner had it, and the checkpoint proves the training. Returns the groups;
        none where the checkpoint is not ahead, or further ahead than what was taken.
        """
        if not self.step < step <= self.next_step:
            return []
        return [group for done in range(self.step, step) for group in self.commit(done, done + 1)]

    def close(self) -> None:
        """The run is over: what is left of the questions is too little for a step."""
        for group in [
            *self._leased.values(),
            *(g for g in self._ready.values() if g.state == State.BUFFERED),
        ]:
            self._give_up(group, "end of the run")

    def rewind(self, step: int, version: int, kept: Callable[[GroupId], bool]) -> Reopened:
        """The learner starts from the checkpoint of `step`: undo what came after and open a new era.

        Groups trained or taken after `step` go back to the buffer where their versions live on and their payload
        is kept; else their questions are pending again. An era in which nothing was taken yet is reused, so that
        the same request twice opens one era.

        Raises:
            LedgerError: the checkpoint is ahead of this ledger (`conflict`).
        """
        if version != step:
            raise LedgerError("conflict", f"the checkpoint of step {step} has version {step}, not {version}")
        if step > self.step:
            raise LedgerError(
                "conflict",
                f"the checkpoint of step {step} is ahead of this broker's ledger (step {self.step})",
            )
        if self.fresh_era and step == self.step:
            return Reopened(0, 0)
        self.era += 1
        self.forks.append(step)
        self.taken.clear()
        undone = [g for g in self.groups.values() if g.step >= step and g.state in IN_A_STEP]
        dropped = sum(self._undo(group, kept) for group in undone)
        self.step = step
        dropped += self._drop_rewound()
        self.fresh_era = True
        return Reopened(len(undone), dropped)

    def _undo(self, group: Group, kept: Callable[[GroupId], bool]) -> bool:
        """Undo the training of a group; True when the group itself is lost."""
        if group.state == State.FILTERED:
            self._move(group, State.FILTERED, step=-1)
            return False
        if kept(group.key):
            self._move(group, State.BUFFERED, step=-1)
            return False
        self._put_back(group, reason="rewound")
        return True

    def _drop_rewound(self) -> int:
        """Drop groups and leases of versions that no longer exist."""
        waiting = [
            group
            for group in self.groups.values()
            if group.state in (State.LEASED, State.BUFFERED)
            or (group.state == State.FILTERED and group.step < 0)
        ]
        gone = [group for group in waiting if not self.exists(group.era, group.newest)]
        for group in gone:
            self._put_back(group, reason="rewound")
        return len(gone)
