"""A message that decodes is well-formed; anything else is refused with a reason."""

from __future__ import annotations

import math
import tracemalloc

import msgpack
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import codec
from common import messages as m

RESPONSE = m.ResponseHeader(tokens=4, reward=1.0, verdict="correct", finish="stop", versions=[(0, 3), (1, 1)])
HEADER = m.GroupHeader(
    group=m.GroupId(0, 3), lease=1, era=0, actor="a", prompt_tokens=5, responses=[RESPONSE, RESPONSE]
)


def packed(kind: str, body: object, protocol: object = codec.PROTOCOL, request: object = 1) -> bytes:
    return msgpack.packb([protocol, kind, request, body])


def test_round_trip_of_a_group() -> None:
    message, request = codec.decode(codec.encode(m.Publish(header=HEADER), 7))
    assert (message, request) == (m.Publish(header=HEADER), 7)
    assert isinstance(message.header.group, m.GroupId)
    assert HEADER.response_tokens == 8
    assert HEADER.payload_sizes == (20, 32, 32)


def test_kinds_are_unique_and_complete() -> None:
    assert {"hello", "lease", "publish", "take", "commit", "rewind", "refused"} <= set(m.Message.kinds)
    assert all(model.kind == kind for kind, model in m.Message.kinds.items())


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (b"", "not msgpack"),
        (b"\xc1", "not msgpack"),
        (msgpack.packb("x"), "not a message"),
        (packed("lease", {}, protocol=99), "protocol 99"),
        (packed("no_such", {}), "unknown kind"),
        (packed("lease", {}, request=-1), "request number"),
        (packed("lease", {}, request=True), r"\[2\]: expected `int`"),
        (packed("lease", []), "lease: expected `object`"),
        (packed("lease", {"capacity": 1}), "version"),
        (packed("lease", {"capacity": -1, "version": 0, "era": 0, "wait_s": 1.0}), "capacity"),
        (packed("lease", {"capacity": True, "version": 0, "era": 0, "wait_s": 1.0}), "capacity"),
        (packed("lease", {"capacity": 1, "version": 0, "era": 0, "wait_s": math.nan}), "wait_s"),
        (
            packed("lease", {"capacity": 1, "version": 0, "era": 0, "wait_s": 1.0, "x": 1}),
            "unknown field `x`",
        ),
        (packed("fetch", {"groups": [[1, -2]]}), r"groups\[0\]\[1\]: expected `int` >= 0"),
        (packed("fetch", {"groups": [[1, 2, 3]]}), "length 2"),
        (packed("heartbeat", {"state": "x", "telemetry": {"a": math.inf}}), "telemetry"),
    ],
)
def test_malformed_frames_are_refused_with_the_reason(frame: bytes, reason: str) -> None:
    with pytest.raises(m.MalformedMessage, match=reason):
        codec.decode(frame)


def test_versions_must_cover_the_tokens() -> None:
    body = msgspec.to_builtins(m.Publish(header=HEADER))
    body["header"]["responses"][0]["versions"] = [(0, 3)]
    with pytest.raises(m.MalformedMessage, match="do not add up"):
        codec.decode(packed("publish", body))
    body["header"]["responses"][0]["versions"] = [(0, 4), (1, 0)]
    with pytest.raises(m.MalformedMessage, match="expected `int` >= 1"):
        codec.decode(packed("publish", body))


def test_a_count_that_is_not_there_allocates_nothing() -> None:
    """A list that claims four thousand million elements in eight bytes is refused before a list is made."""
    claimed = msgpack.packb([codec.PROTOCOL, "fetch", 1])[1:] + b"\x81\xa6groups\xdd\xff\xff\xff\xff"
    tracemalloc.start()
    with pytest.raises(m.MalformedMessage, match="not msgpack"):
        codec.decode(b"\x94" + claimed)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_numbers_of_numpy_travel_as_numbers() -> None:
    commit = m.Commit(step=np.int64(2), version=3, metrics={"loss": np.float32(0.5)})
    message, _ = codec.decode(codec.encode(commit, 1))
    assert message == m.Commit(step=2, version=3, metrics={"loss": 0.5})


@given(st.binary(max_size=300))
def test_no_bytes_crash_the_decoder(frame: bytes) -> None:
    try:
        codec.decode(frame)
    except m.MalformedMessage as error:
        assert str(error)


ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(st.sampled_from(sorted(m.Message.kinds)), ANY)
def test_no_body_crashes_the_decoder(kind: str, body: object) -> None:
    try:
        message, _ = codec.decode(packed(kind, body))
    except m.MalformedMessage as error:
        assert str(error)
    else:
        assert message.kind == kind
