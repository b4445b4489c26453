"""What the verifier says about one response.

Invariant: the five outcomes are distinct states. A crash or a timeout of the verifier is `unverified`, never a
silent `wrong`; only `correct` earns the reward.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    """The five verdicts of a scored response.

    `truncated` comes from the engine's finish reason, so only the actor assigns it; `unverified` comes only from
    the pool, which alone can stop a verification.
    """

    CORRECT = "correct"
    WRONG = "wrong"
    UNFORMATTED = "unformatted"
    TRUNCATED = "truncated"
    UNVERIFIED = "unverified"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One graded response.

    Attributes:
        verdict: the outcome.
        extracted: the answer text that was compared, or None if the response held none.
        reward: 1.0 for `correct`, else 0.0 (the paper, section 3.2); a custom reward function sets its own.
        reason: one sentence for `unverified` and `unformatted`, else None.
        seconds: wall time spent on this response by whoever computed it; 0.0 for a cached verdict.
    """

    verdict: Outcome
    extracted: str | None = None
    reward: float = 0.0
    reason: str | None = None
    seconds: float = 0.0


def correct(extracted: str) -> Verdict:
    """The response answers the question."""
    return Verdict(Outcome.CORRECT, extracted, reward=1.0)


def wrong(extracted: str) -> Verdict:
    """The response holds a formatted answer that is not the gold answer."""
    return Verdict(Outcome.WRONG, extracted)


def unformatted(reason: str) -> Verdict:
    """The response holds no answer in the template's format."""
    return Verdict(Outcome.UNFORMATTED, reason=reason)


def unverified(reason: str, extracted: str | None = None, seconds: float = 0.0) -> Verdict:
    """The verifier itself failed: killed at its deadline, crashed, or a broken reward function."""
    return Verdict(Outcome.UNVERIFIED, extracted, reason=reason, seconds=seconds)
