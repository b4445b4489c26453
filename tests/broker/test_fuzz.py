"""Whatever arrives, the broker answers with a reason, changes nothing, and goes on (I8)."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker.main import open_run
from broker.service import Service
from broker.state import load_training_set
from common.codec import PROTOCOL, decode, encode
from common.messages import (
    Assignment,
    Commit,
    Fetch,
    Grant,
    GroupId,
    GroupQuery,
    Heartbeat,
    Hello,
    Lease,
    Message,
    Pin,
    Publish,
    Refused,
    Release,
    Rewind,
    StatusQuery,
    Take,
    Welcome,
)
from tests.scripted.actor import make_group
from tests.scripted.broker import scripted_recipe

PER_EXAMPLE = 40
NIGHTLY = 100_000
KINDS = sorted(Message.kinds)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=8),
    st.sampled_from(["actor", "learner", "x", "0.1.0", "test"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=5,
)


def fields_of(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    """A body with the right names and wrong values."""
    return st.fixed_dictionaries({}, optional=dict.fromkeys(Message.kinds[kind].__struct_fields__, values))


bodies = st.sampled_from(KINDS).flatmap(lambda kind: st.tuples(st.just(kind), fields_of(kind)))
headers = st.one_of(
    st.binary(max_size=64),
    values.map(lambda value: msgpack.packb(value, default=str)),
    st.tuples(st.just(PROTOCOL), st.text(max_size=12), st.integers(0, 9), values).map(msgpack.packb),
    st.tuples(bodies, st.integers(-1, 9)).map(lambda t: msgpack.packb([PROTOCOL, t[0][0], t[1], t[0][1]])),
)
frames = st.tuples(headers, st.lists(st.binary(max_size=64), max_size=3)).map(lambda t: [t[0], *t[1]])


def new_service(folder: Path, **broker: Any) -> Service:
    recipe = scripted_recipe(folder, broker={"max_bad_messages": 10**9, **broker})
    return Service(open_run(recipe, recipe.folder, load_training_set(recipe), []))


def say(
    service: Service, connection: bytes, message: Message, payload: list[bytes] | tuple[()] = ()
) -> Message:
    service.receive(connection, [memoryview(f) for f in [encode(message, 1), *payload]], 0.0)
    service.settle(0.0)
    (reply,) = service.outbox.empty()
    return decode(reply.frames[0])[0]


def join(service: Service, role: str) -> bytes:
    name = role.encode()
    hello = Hello(role=role, peer=role, software="0.1.0", host="test", pid=1)
    assert isinstance(say(service, name, hello), Welcome)
    return name


def bombard(folder: Path, messages: list[list[bytes]]) -> None:
    """Send them in turn as actor, learner and stranger: one answer or a wait for each, and the sum holds."""
    service = new_service(folder)
    senders = [join(service, "actor"), join(service, "learner"), b"stranger"]
    for number, message in enumerate(messages):
        before = service.state.ledger.meta()
        service.receive(senders[number % 3], [memoryview(frame) for frame in message], 0.0)
        service.settle(0.0)
        replies = [decode(reply.frames[0])[0] for reply in service.outbox.empty()]
        assert len(replies) <= 2, "the answer, and one to a request that had waited"
        assert not any(getattr(reply, "code", "") == "internal" for reply in replies), replies
        if replies and isinstance(replies[0], Refused):
            assert service.state.ledger.meta() == before
            assert replies[0].reason
    assert service.state.ledger.counts()["sum_ok"]
    if service.ending.reason is None:
        for now in range(20):
            service.tick(float(now))
        goes_on(service)


def goes_on(service: Service) -> None:
    """A well-behaved actor still gets its work done."""
    hello = Hello(role="actor", peer="good", software="0.1.0", host="test", pid=2)
    say(service, b"good", hello)
    era, version = service.state.ledger.era, service.state.ledger.version
    grant = say(service, b"good", Lease(capacity=1, version=version, era=era, wait_s=0.0))
    assert isinstance(grant, Grant)
    (assignment,) = grant.groups
    header, payload = make_group(assignment, actor="good", era=era, versions=(version,), tokens=10)
    assert say(service, b"good", Publish(header=header), payload).status == "accepted"


def fuzz_settings(count: int) -> settings:
    return settings(
        max_examples=max(1, count // PER_EXAMPLE),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


many = st.lists(frames, min_size=PER_EXAMPLE, max_size=PER_EXAMPLE)


def mutants(seed: int, count: int) -> list[list[bytes]]:
    """Well-formed requests with flipped bytes, cut or repeated frames."""
    draw = random.Random(seed)
    return [_mutate(draw, draw.choice(SPECIMENS)) for _ in range(count)]


def _mutate(draw: random.Random, specimen: list[bytes]) -> list[bytes]:
    whole = [bytearray(frame) for frame in specimen]
    for _ in range(draw.randint(1, 6)):
        frame = draw.choice(whole)
        if frame:
            frame[draw.randrange(len(frame))] = draw.randrange(256)
    if draw.random() < 0.2:
        whole.append(bytearray(draw.randbytes(draw.randint(0, 40))))
    if draw.random() < 0.2:
        whole = whole[: draw.randint(1, len(whole))]
    return [bytes(frame[: draw.randint(0, len(frame))] if draw.random() < 0.1 else frame) for frame in whole]


def _specimens() -> list[list[bytes]]:
    question = {"problem": "1 + 1 = ?", "answer": "2"}
    assignment = Assignment(group=GroupId(0, 3), lease=1, question=question, samples=4, deadline_s=9.0)
    header, payload = make_group(assignment, actor="actor", era=0, versions=(0,), tokens=3)
    beat = Heartbeat(state="working", leases=[GroupId(0, 1)], telemetry={"cpu": 1.0})
    hello = Hello(role="actor", peer="actor", software="0.1.0", host="test", pid=1)
    plain = [
        hello,
        beat,
        Lease(capacity=2, version=0, era=0, wait_s=1.0),
        Release(groups=[GroupId(0, 1)], reason="no memory"),
        Rewind(step=0, version=0),
        Take(step=0, wait_s=0.5),
        Fetch(groups=[GroupId(0, 1)]),
        Commit(step=0, version=1, metrics={"reward": 0.5}),
        Pin(step=0, path="somewhere"),
        StatusQuery(groups=True),
        GroupQuery(group=GroupId(0, 1)),
    ]
    return [[encode(message, 3)] for message in plain] + 3 * [[encode(Publish(header=header), 3), *payload]]


SPECIMENS = _specimens()


@fuzz_settings(800)
@given(messages=many)
def test_messages_made_up(tmp_path_factory: pytest.TempPathFactory, messages: list[list[bytes]]) -> None:
    bombard(tmp_path_factory.mktemp("fuzz"), messages)


@pytest.mark.parametrize("seed", range(6))
def test_messages_damaged(tmp_path: Path, seed: int) -> None:
    bombard(tmp_path, mutants(seed, 200))


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_damaged(tmp_path: Path) -> None:
    for seed in range(10, 10 + NIGHTLY // 1000):
        bombard(tmp_path / str(seed), mutants(seed, 1000))


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@fuzz_settings(NIGHTLY // 5)
@given(messages=many)
def test_twenty_thousand_made_up(
    tmp_path_factory: pytest.TempPathFactory, messages: list[list[bytes]]
) -> None:
    bombard(tmp_path_factory.mktemp("fuzz"), messages)


# --- groups that are almost right --------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_damaged_group_is_refused_with_its_reason(
    tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    service = new_service(tmp_path_factory.mktemp("damage"))
    actor = join(service, "actor")
    (assignment,) = say(service, actor, Lease(capacity=1, version=0, era=0, wait_s=0.0)).groups
    header, payload = make_group(assignment, actor="actor", era=0, versions=(0,), tokens=10)
    damage = data.draw(st.sampled_from(sorted(DAMAGES)))
    header, payload = DAMAGES[damage](header, payload)
    reply = say(service, actor, Publish(header=header), payload)
    assert isinstance(reply, Refused)
    assert damage in reply.reason
    assert service.state.ledger.groups[GroupId(*assignment.group)].state.name == "LEASED"
    assert service.state.store.bytes_held == 0


def _replace(buffers: list[bytes], which: int, start: int, value: bytes) -> list[bytes]:
    changed = bytearray(buffers[which])
    changed[start : start + len(value)] = value
    return [bytes(changed) if i == which else part for i, part in enumerate(buffers)]


NAN, MINUS_ONE, LARGE = b"\x00\x00\xc0\x7f", b"\xff\xff\xff\xff", b"\x40\x00\x00\x00"
DAMAGES = {
    "payload of": lambda h, p: (h, [p[0], p[1][:-4], p[2]]),
    "the header announces": lambda h, p: (h, p[:2]),
    "outside the vocabulary": lambda h, p: (h, _replace(p, 1, 8, MINUS_ONE)),
    "prompt token id": lambda h, p: (h, _replace(p, 0, 0, LARGE)),
    "not finite": lambda h, p: (h, _replace(p, 2, 4, NAN)),
    "or above 0": lambda h, p: (h, _replace(p, 2, 4, b"\x00\x00\x80\x3f")),
    "a group has 4": lambda h, p: (msgspec.structs.replace(h, responses=h.responses[:3]), p),
    "published as": lambda h, p: (msgspec.structs.replace(h, actor="other"), p),
    "no lease": lambda h, p: (msgspec.structs.replace(h, lease=9), p),
}


def test_past_the_limit_a_peer_is_shut_out_and_others_are_not(tmp_path: Path) -> None:
    service = new_service(tmp_path, max_bad_messages=5)
    actor, other = join(service, "actor"), join(service, "learner")
    codes = []
    for _ in range(12):
        service.receive(actor, [memoryview(b"rubbish")], 0.0)
        codes += [decode(reply.frames[0])[0].code for reply in service.outbox.empty()]
    assert codes == ["malformed"] * 4 + ["shut_out"] * 6, "then silence"
    refused = say(service, actor, Lease(capacity=1, version=0, era=0, wait_s=0.0))
    assert refused.code == "shut_out"
    again = Hello(role="actor", peer="actor", software="0.1.0", host="test", pid=9)
    assert say(service, b"a new connection", again).code == "shut_out"
    assert isinstance(
        say(service, other, Hello(role="learner", peer="learner", software="0.1.0", host="h", pid=1)), Welcome
    )
    assert "shut out after 5" in service.state.events[-1]["text"]


def test_bad_messages_now_and_then_shut_nobody_out(tmp_path: Path) -> None:
    """A peer that says one wrong thing a minute, all day, goes on; so does one that was shut out, in time."""
    service = new_service(tmp_path, max_bad_messages=5)
    actor = join(service, "actor")
    for minute in range(100):
        service.receive(actor, [memoryview(b"rubbish")], 60.0 * minute)
    for second in range(5):
        service.receive(actor, [memoryview(b"rubbish")], 6000.0 + second)
    service.outbox.empty()

    def ask(now: float) -> Message:
        service.receive(actor, [memoryview(encode(Lease(capacity=1, version=0, era=0, wait_s=0.0), 1))], now)
        service.settle(now)
        return decode(service.outbox.empty()[-1].frames[0])[0]

    assert getattr(ask(6004.0), "code", "") == "shut_out"
    assert isinstance(ask(6200.0), Grant)
    assert service.state.members.peers["actor"].bad == 105, "the status counts them all"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"run": "another"}, "serves the run 'test'"),
        ({"software": "7.0"}, "b on h is 7.0: install the same version there"),
        ({"tokenizer": "other"}, "the tokenizer of b on h differs"),
    ],
)
def test_a_foreign_peer_is_told_what_does_not_fit(tmp_path: Path, changes: dict, named: str) -> None:
    service = new_service(tmp_path)
    fits = {"role": "actor", "peer": "a", "software": "0.1.0", "host": "h", "pid": 1, "tokenizer": "t"}
    assert isinstance(say(service, b"1", Hello(**fits)), Welcome)
    reply = say(service, b"2", Hello(**{**fits, "peer": "b", **changes}))
    assert reply.code == "incompatible"
    assert named in reply.reason


def test_there_is_one_learner_at_a_time(tmp_path: Path) -> None:
    service = new_service(tmp_path)
    join(service, "learner")
    second = Hello(role="learner", peer="usurper", software="0.1.0", host="h", pid=1)
    assert say(service, b"2", second).code == "conflict"
    for now in range(100):
        service.tick(float(now))
    assert isinstance(say(service, b"2", second), Welcome), "the first one is dead"


def test_a_broker_that_stood_still_blames_nobody(tmp_path: Path) -> None:
    """After a minute without processor or disk, peers and leases are as alive as before."""
    service = new_service(tmp_path)
    actor = join(service, "actor")
    say(service, actor, Lease(capacity=1, version=0, era=0, wait_s=0.0))
    service.tick(0.25)
    service.tick(60.0)
    assert service.state.members.alive("actor")
    assert service.state.ledger.counts()["in_flight"] == 1
    for now in range(61, 70):
        service.tick(float(now))
    assert not service.state.members.alive("actor"), "but now it is silent"
    assert service.state.ledger.counts()["in_flight"] == 0


def test_a_defect_of_ours_is_told_and_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = new_service(tmp_path)
    actor = join(service, "actor")

    def broken(*_: Any) -> None:
        raise KeyError("a defect")

    monkeypatch.setitem(service._handlers, "release", broken)
    reply = say(service, actor, Release(groups=[], reason="why"))
    assert (reply.code, "a defect" in reply.reason) == ("internal", True)
    assert "defect" in service.state.events[-1]["text"]
    goes_on(service)
