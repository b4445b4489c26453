"""Batches put together from packed headers equal batches made in the ordinary way."""

from __future__ import annotations

import msgpack
import msgspec
from hypothesis import given
from hypothesis import strategies as st

from broker.batch import batch_body
from broker.store import Entry
from common.codec import PROTOCOL, decode, encode, encode_plain
from common.messages import Assignment, Batch, GroupHeader, GroupId, Publish
from tests.scripted.actor import make_group


def header_of(index: int) -> GroupHeader:
    assignment = Assignment(
        group=GroupId(0, index), lease=1, question={"problem": "?"}, samples=3, deadline_s=1.0
    )
    return make_group(assignment, actor="a", era=2, versions=(4, 5), tokens=6)[0]


@given(
    count=st.integers(0, 20),
    request=st.integers(0, 2**63 - 1),
    rewards=st.lists(st.floats(-1, 1), max_size=5),
)
def test_the_frame_is_that_of_the_message(count: int, request: int, rewards: list[float]) -> None:
    headers = [header_of(index) for index in range(count)]
    entries = [Entry(encode(Publish(header=header), index), ()) for index, header in enumerate(headers)]
    body = batch_body(7, [entry.packed_header for entry in entries], count + len(rewards), rewards)
    frame = encode_plain("batch", request, body)
    expected = Batch(
        step=7,
        ready=True,
        groups=headers,
        scheduled=count + len(rewards),
        filtered=len(rewards),
        filtered_rewards=rewards,
    )
    assert decode(frame) == (expected, request)


def test_a_key_given_twice_smuggles_nothing_past_the_validation() -> None:
    """The message that decodes has the last of two equal keys; so must what goes to the learner."""
    good = msgpack.packb(msgspec.to_builtins(header_of(1)))
    packer = msgpack.Packer()
    frame = b"".join(
        [
            packer.pack_array_header(4),
            packer.pack(PROTOCOL),
            packer.pack("publish"),
            packer.pack(9),
            packer.pack_map_header(2),
            packer.pack("header"),
            msgpack.packb(msgspec.to_builtins(header_of(2))),
            packer.pack("header"),
            good,
        ]
    )
    assert decode(frame)[0].header == header_of(1)
    assert msgpack.unpackb(Entry(frame, ()).packed_header) == msgpack.unpackb(good)
