"""The `Batch` reply, put together from headers as they came.

Invariant: the frame decodes to the same `messages.Batch` as one that is built and encoded in the ordinary way;
unpacking and packing every header again would cost more than all else that a step costs the broker.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec


def batch_body(
    step: int, headers: Sequence[msgspec.Raw], scheduled: int, filtered_rewards: Sequence[float]
) -> dict[str, Any]:
    """The body of a ready batch, for `Outbox.reply_plain`.

    Args:
        step: the step.
        headers: `GroupHeader`s as msgpack, each validated when it came in.
        scheduled: groups that count in N.
        filtered_rewards: mean reward of each group that is not sent.
    """
    return {
        "step": step,
        "ready": True,
        "scheduled": scheduled,
        "filtered": len(filtered_rewards),
        "filtered_rewards": filtered_rewards,
        "groups": headers,
    }
