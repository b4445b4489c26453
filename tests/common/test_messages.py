"""A message that decodes is well-formed; anything else is refused with a reason."""

from __future__ import annotations

import math

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import messages as m

RESPONSE = m.ResponseHeader(tokens=4, reward=1.0, verdict="correct", finish="stop", versions=[(0, 3), (1, 1)])
HEADER = m.GroupHeader(
    group=m.GroupId(0, 3), lease=1, era=0, actor="a", prompt_tokens=5, responses=[RESPONSE, RESPONSE]
)


def packed(kind: str, body: object, protocol: object = m.PROTOCOL, request: object = 1) -> bytes:
    return msgpack.packb([protocol, kind, request, body])


def test_round_trip_of_a_group() -> None:
    message, request = m.decode(m.encode(m.Publish(header=HEADER), 7))
    assert (message, request) == (m.Publish(header=HEADER), 7)
    assert isinstance(message.header.group, m.GroupId)
    assert (HEADER.min_version, HEADER.max_version, HEADER.response_tokens) == (0, 1, 8)
    assert HEADER.payload_sizes == (20, 32, 32)


def test_kinds_are_unique_and_complete() -> None:
    assert {"hello", "lease", "publish", "take", "commit", "rewind", "refused"} <= set(m.Message._kinds)
    assert all(model.kind == kind for kind, model in m.Message._kinds.items())


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (b"", "not msgpack"),
        (b"\xc1", "not msgpack"),
        (msgpack.packb("x"), "not a message"),
        (packed("lease", {}, protocol=99), "protocol 99"),
        (packed("no_such", {}), "unknown kind"),
        (packed("lease", {}, request=-1), "request number"),
        (packed("lease", {}, request=True), "request number"),
        (packed("lease", []), "not a map"),
        (packed("lease", {"capacity": 1}), "version"),
        (packed("lease", {"capacity": -1, "version": 0, "era": 0, "wait_s": 1.0}), "capacity"),
        (packed("lease", {"capacity": True, "version": 0, "era": 0, "wait_s": 1.0}), "capacity"),
        (packed("lease", {"capacity": 1, "version": 0, "era": 0, "wait_s": math.nan}), "wait_s"),
        (packed("lease", {"capacity": 1, "version": 0, "era": 0, "wait_s": 1.0, "x": 1}), "x"),
        (packed("fetch", {"groups": [[1, -2]]}), "epoch and index"),
        (packed("fetch", {"groups": [[1, 2, 3]]}), "pair"),
        (packed("heartbeat", {"state": "x", "telemetry": {"a": math.inf}}), "telemetry"),
    ],
)
def test_malformed_frames_are_refused_with_the_reason(frame: bytes, reason: str) -> None:
    with pytest.raises(m.MalformedMessage, match=reason):
        m.decode(frame)


def test_versions_must_cover_the_tokens() -> None:
    body = m.Publish(header=HEADER).model_dump(mode="python")
    body["header"]["responses"][0]["versions"] = [(0, 3)]
    with pytest.raises(m.MalformedMessage, match="do not add up"):
        m.decode(packed("publish", body))
    body["header"]["responses"][0]["versions"] = [(0, 4), (1, 0)]
    with pytest.raises(m.MalformedMessage, match="greater than or equal to 1"):
        m.decode(packed("publish", body))


def test_payload_sizes_are_checked() -> None:
    m.check_payload(HEADER, [bytes(20), bytes(32), bytes(32)])
    for payload in ([bytes(20), bytes(32)], [bytes(20), bytes(32), bytes(28)], []):
        with pytest.raises(m.MalformedMessage, match="payload"):
            m.check_payload(HEADER, payload)


@given(st.binary(max_size=300))
def test_no_bytes_crash_the_decoder(frame: bytes) -> None:
    try:
        m.decode(frame)
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


@given(st.sampled_from(sorted(m.Message._kinds)), ANY)
def test_no_body_crashes_the_decoder(kind: str, body: object) -> None:
    try:
        message, _ = m.decode(packed(kind, body))
    except m.MalformedMessage as error:
        assert str(error)
    else:
        assert message.kind == kind
