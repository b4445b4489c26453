"""What the policy samples: figures over all groups that actors publish, between one step and the next.

Invariant: each publication counts once, in the window it arrives in, whatever becomes of it: the learner sees
neither the groups that are filtered for equal rewards nor those that expire, so that accuracy and lengths of what
it trains on are not those of the policy. A duplicate counts nowhere. The open window is kept in the journal with
the other meters; a broker that is killed loses what came after its last save.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol


class Profile(Protocol):
    """What is read of a group, by response; see `broker.meters.Profile`."""

    lengths: list[int]
    rewards: list[float]
    verdicts: list[str]
    tokens: int


class Rollouts:
    """The open window, and in `last` the metrics of the one before (names: group `actor` of the catalogue)."""

    def __init__(self) -> None:
        self._sums: Counter[str] = Counter()
        self._verdicts: Counter[str] = Counter()
        self._reward = 0.0
        self._longest = 0
        self.last: dict[str, float] = {}

    def add(self, group: Profile, lag: int) -> None:
        """Count a group.

        Args:
            group: of at least one response.
            lag: versions between its oldest token and the newest version.
        """
        verdicts, rewards, lengths = group.verdicts, group.rewards, group.lengths
        correct = verdicts.count("correct")
        sums = self._sums
        sums["groups"] += 1
        sums["responses"] += len(verdicts)
        sums["all_correct"] += correct == len(verdicts)
        sums["all_wrong"] += not correct
        sums["equal_reward"] += min(rewards) == max(rewards)
        sums["lag"] += lag
        sums["tokens"] += group.tokens
        if correct:
            pairs = zip(lengths, verdicts, strict=True)
            sums["tokens_correct"] += sum(length for length, verdict in pairs if verdict == "correct")
        self._verdicts.update(verdicts)
        self._reward += sum(rewards)
        self._longest = max(self._longest, *lengths)

    def close_window(self) -> dict[str, float]:
        """The metrics of the window, which ends; without those that nothing was counted for."""
        self.last = self._metrics()
        self._sums.clear()
        self._verdicts.clear()
        self._reward, self._longest = 0.0, 0
        return self.last

    def _metrics(self) -> dict[str, float]:
        sums, verdicts = self._sums, self._verdicts
        groups, responses, correct = sums["groups"], sums["responses"], verdicts["correct"]
        if not groups:
            return {"groups": 0.0, "responses": 0.0}
        metrics = {
            "groups": float(groups),
            "responses": float(responses),
            "reward": self._reward / responses,
            "accuracy": correct / responses,
            "format_share": (correct + verdicts["wrong"]) / responses,
            "truncated": verdicts["truncated"] / responses,
            "unverified": verdicts["unverified"] / responses,
            "length": sums["tokens"] / responses,
            "length_max": float(self._longest),
            "groups_all_correct": sums["all_correct"] / groups,
            "groups_all_wrong": sums["all_wrong"] / groups,
            "groups_equal_reward": sums["equal_reward"] / groups,
            "staleness": sums["lag"] / groups,
        }
        if correct:
            metrics["length_correct"] = sums["tokens_correct"] / correct
        if responses > correct:
            metrics["length_incorrect"] = (sums["tokens"] - sums["tokens_correct"]) / (responses - correct)
        return metrics

    def state(self) -> dict[str, Any]:
        """For the journal."""
        return {
            "sums": dict(self._sums),
            "verdicts": dict(self._verdicts),
            "reward": self._reward,
            "longest": self._longest,
            "last": self.last,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """As saved by `state`."""
        self._sums, self._verdicts = Counter(state["sums"]), Counter(state["verdicts"])
        self._reward, self._longest, self.last = state["reward"], state["longest"], dict(state["last"])
