"""A published group in the numbers that the broker counts.

Invariant: read from the header once, when the group arrives; checks, ledger, meters and figures all use this.
"""

from __future__ import annotations

from typing import NamedTuple

from common.messages import GroupHeader


class Profile(NamedTuple):
    """What the broker counts of a group: by response its length, reward and verdict; its tokens by version."""

    lengths: list[int]
    rewards: list[float]
    verdicts: list[str]
    versions: dict[int, int]
    tokens: int

    @classmethod
    def of(cls, header: GroupHeader) -> Profile:
        """The profile of a published group; read once, for all who count."""
        versions: dict[int, int] = {}
        lengths: list[int] = []
        rewards: list[float] = []
        verdicts: list[str] = []
        for response in header.responses:
            lengths.append(response.tokens)
            rewards.append(response.reward)
            verdicts.append(response.verdict)
            for version, tokens in response.versions:
                versions[version] = versions.get(version, 0) + tokens
        return cls(lengths, rewards, verdicts, versions, sum(lengths))

    @property
    def oldest(self) -> int:
        """Oldest version that sampled a token of the group."""
        return min(self.versions)

    @property
    def newest(self) -> int:
        """Newest version that sampled a token of the group."""
        return max(self.versions)
