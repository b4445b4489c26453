"""The `Batch` reply, put together from headers as they came.

Invariant: the frame decodes to the same `messages.Batch` as one that is built and encoded in the ordinary way;
unpacking, validating and packing every header again would cost more than all else that a step costs the broker.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgpack

from common.messages import PROTOCOL


def batch_frame(
    request: int, step: int, headers: Sequence[bytes], scheduled: int, filtered_rewards: Sequence[float]
) -> bytes:
    """The header frame of a ready batch.

    Args:
        request: number of the request that it answers.
        step: the step.
        headers: `GroupHeader`s as msgpack, each validated when it came in.
        scheduled: groups that count in N.
        filtered_rewards: mean reward of each group that is not sent.
    """
    fields = {
        "step": step,
        "ready": True,
        "scheduled": scheduled,
        "filtered": len(filtered_rewards),
        "filtered_rewards": list(filtered_rewards),
    }
    return b"".join(_parts(request, fields, headers))


def _parts(request: int, fields: dict[str, Any], headers: Sequence[bytes]) -> Iterable[bytes]:
    packer = msgpack.Packer(use_bin_type=True)
    yield packer.pack_array_header(4)
    yield from (packer.pack(part) for part in (PROTOCOL, "batch", request))
    yield packer.pack_map_header(len(fields) + 1)
    for name, value in fields.items():
        yield packer.pack(name)
        yield packer.pack(value)
    yield packer.pack("groups")
    yield packer.pack_array_header(len(headers))
    yield from headers
