"""What the ledger keeps of a question, and the words in which it speaks of it.

Invariant: plain data; nothing here decides anything. The numbers of `State` are stored in journals.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal, NamedTuple

from common.messages import GroupId


class State(IntEnum):
    """Where a question is. The values are stored in the journal: never renumber."""

    PENDING = 0
    LEASED = 1
    BUFFERED = 2
    TAKEN = 3
    CONSUMED = 4
    FILTERED = 5
    ABANDONED = 6


@dataclass(frozen=True, slots=True)
class Rules:
    """What the ledger needs to know of the recipe (see `common.recipe.schema` for units and defaults)."""

    questions: int
    groups_per_step: int
    steps: int
    max_staleness: int
    max_epochs: int = 20
    seed: int = 42
    max_attempts: int = 5
    lease_s: float = 600.0
    lease_max_s: float = 3600.0
    unlisted_s: float = 30.0
    zero_variance: Literal["count", "train", "refill"] = "count"


@dataclass(slots=True)
class Group:
    """One question of one epoch. `oldest`/`newest` are versions: of its tokens, or of its actor when leased."""

    key: GroupId
    position: int
    state: State = State.PENDING
    lease: int = 0
    failures: int = 0
    actor: str = ""
    era: int = 0
    oldest: int = 0
    newest: int = 0
    step: int = -1
    reward: float = 0.0
    tokens: int = 0
    granted: float = field(default=0.0, compare=False)
    renewed: float = field(default=0.0, compare=False)

    @property
    def order(self) -> tuple[int, int]:
        """Place in the order of all questions of all epochs."""
        return self.key.epoch, self.position


class Facts(NamedTuple):
    """What the ledger must know of a published group."""

    key: GroupId
    lease: int
    actor: str
    era: int
    oldest: int
    newest: int
    reward: float
    tokens: int
    zero_variance: bool


class Published(NamedTuple):
    """Outcome of a publication; `unknown` and `future` change nothing."""

    status: Literal["accepted", "duplicate", "filtered", "expired", "unknown", "future"]
    reason: str | None = None


class Reopened(NamedTuple):
    """Outcome of a rewind: questions whose training is undone, groups dropped."""

    reopened: int
    dropped: int


class LedgerError(Exception):
    """A request that contradicts the ledger; `code` as in `messages.Refused`. Nothing has changed."""

    def __init__(self, code: Literal["stale", "conflict", "not_now"], reason: str) -> None:
        super().__init__(reason)
        self.code = code


IN_BUFFER = (State.BUFFERED, State.TAKEN, State.CONSUMED)
ARRIVED = (*IN_BUFFER, State.FILTERED)  # a publication of the present lease has been accepted
# What a group of a step is, until a rewind undoes it.
IN_A_STEP = (State.TAKEN, State.CONSUMED, State.FILTERED)
