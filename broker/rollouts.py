"""What the policy samples: figures over all groups that actors publish, between one step and the next.

Invariant: each publication counts once, in the window it arrives in, whatever becomes of it: the learner sees
neither the groups that are filtered for equal rewards nor those that expire, so that accuracy and lengths of what
it trains on are not those of the policy. A duplicate counts nowhere. The open window is kept in the journal with
the other meters; a broker that is killed loses what came after its last save.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from broker.profile import Profile


@dataclass(slots=True)
class _Window:
    """Sums over groups (`groups` to `equal_reward`; `lag` in versions) and over their responses."""

    groups: int = 0
    all_correct: int = 0
    all_wrong: int = 0
    equal_reward: int = 0
    lag: int = 0
    responses: int = 0
    reward: float = 0.0
    correct: int = 0
    wrong: int = 0
    truncated: int = 0
    unverified: int = 0
    tokens: int = 0
    tokens_correct: int = 0
    longest: int = 0

    def metrics(self) -> dict[str, float]:
        """Means and shares, by their names in the catalogue."""
        metrics = {"groups": float(self.groups), "responses": float(self.responses)}
        if not self.groups:
            return metrics
        formatted = self.correct + self.wrong
        over_responses = {
            "reward": self.reward,
            "accuracy": self.correct,
            "format_share": formatted,
            "truncated": self.truncated,
            "unverified": self.unverified,
            "length": self.tokens,
        }
        over_groups = {
            "groups_all_correct": self.all_correct,
            "groups_all_wrong": self.all_wrong,
            "groups_equal_reward": self.equal_reward,
            "staleness": self.lag,
        }
        metrics |= {name: value / self.responses for name, value in over_responses.items()}
        metrics |= {name: value / self.groups for name, value in over_groups.items()}
        metrics["length_max"] = float(self.longest)
        others = self.responses - self.correct
        if self.correct:
            metrics["length_correct"] = self.tokens_correct / self.correct
        if others:
            metrics["length_incorrect"] = (self.tokens - self.tokens_correct) / others
        return metrics


class Rollouts:
    """The open window, and in `last` the metrics of the one before (names: group `actor` of the catalogue).

    `add` is called for every group that passes the broker: it counts with plain integers and lists.
    """

    def __init__(self) -> None:
        self._window = _Window()
        self.last: dict[str, float] = {}

    def add(self, group: Profile, lag: int) -> None:
        """Count a group.

        Args:
            group: of at least one response.
            lag: versions between its oldest token and the newest version.
        """
        window, verdicts, rewards, lengths = self._window, group.verdicts, group.rewards, group.lengths
        count, correct = len(verdicts), verdicts.count("correct")
        window.groups += 1
        window.responses += count
        window.reward += sum(rewards)
        window.equal_reward += rewards.count(rewards[0]) == count
        window.lag += lag
        window.tokens += group.tokens
        window.longest = max(window.longest, *lengths)
        if correct == count:
            window.all_correct += 1
            window.tokens_correct += group.tokens
        elif correct:
            pairs = zip(lengths, verdicts, strict=True)
            window.tokens_correct += sum([length for length, verdict in pairs if verdict == "correct"])
        else:
            window.all_wrong += 1
        window.correct += correct
        if correct < count:
            window.wrong += verdicts.count("wrong")
            window.truncated += verdicts.count("truncated")
            window.unverified += verdicts.count("unverified")

    def close_window(self) -> dict[str, float]:
        """The metrics of the window, which ends; without those that nothing was counted for."""
        self.last, self._window = self._window.metrics(), _Window()
        return self.last

    def state(self) -> dict[str, Any]:
        """For the journal."""
        return {"window": asdict(self._window), "last": self.last}

    def restore(self, state: Mapping[str, Any]) -> None:
        """As saved by `state`."""
        self._window, self.last = _Window(**state["window"]), dict(state["last"])
