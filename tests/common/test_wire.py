"""A request is answered once, or fails with the reason, whatever the broker does meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from common import codec, wire
from common import messages as m
from common.software import software_version
from tests.scripted.ports import reserved_port

HELLO = m.Hello(role="observer", peer="p", software="test", host="h", pid=1)
Handler = Callable[[m.Message, list[bytes]], tuple[m.Message, list[bytes]] | None]


class TinyBroker(threading.Thread):
    """A real ROUTER that answers by a function; None means no answer."""

    def __init__(self, handler: Handler, port: int | None = None) -> None:
        super().__init__(daemon=True)
        self.handler = handler
        self.seen: list[m.Message] = []
        self.socket = zmq.Context.instance().socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        if port is None:
            port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        else:
            self.socket.bind(f"tcp://127.0.0.1:{port}")
        self.port = port
        self.ending = threading.Event()

    def run(self) -> None:
        while not self.ending.is_set():
            if not self.socket.poll(20):
                continue
            identity, header, *payload = self.socket.recv_multipart()
            message, request = codec.decode(header)
            self.seen.append(message)
            answer = self.handler(message, payload)
            if answer is not None:
                self.socket.send_multipart([identity, codec.encode(answer[0], request), *answer[1]])
        self.socket.close()


@pytest.fixture
def start() -> Iterator[Callable[[Handler], TinyBroker]]:
    running: list[TinyBroker] = []

    def go(handler: Handler, port: int | None = None) -> TinyBroker:
        broker = TinyBroker(handler, port)
        broker.start()
        running.append(broker)
        return broker

    yield go
    for broker in running:
        broker.ending.set()
        broker.join()


@pytest.fixture
def _short_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that lose something. On a busy machine a request is then sent again though nothing was lost."""
    monkeypatch.setattr(wire, "ATTEMPT_S", 0.2)


losing = pytest.mark.usefixtures("_short_attempts")


def test_request_and_payload_come_back(start: Callable[[Handler], TinyBroker]) -> None:
    broker = start(lambda message, payload: (m.Ack(reason="hi"), [*payload, b"more"]))
    client = wire.Client(f"127.0.0.1:{broker.port}", HELLO)
    reply = client.request(m.Goodbye(reason="x"), [b"abc"], timeout_s=60)
    assert reply.message == m.Ack(reason="hi")
    assert [bytes(buffer) for buffer in reply.payload] == [b"abc", b"more"]
    client.close()


@losing
def test_lost_answer_is_asked_for_again(start: Callable[[Handler], TinyBroker]) -> None:
    broker = start(lambda message, payload: (m.Ack(), []) if len(broker.seen) > 2 else None)
    client = wire.Client(f"127.0.0.1:{broker.port}", HELLO)
    assert client.request(m.Goodbye(reason="x"), timeout_s=60).message == m.Ack()
    assert len(broker.seen) >= 3
    client.close()


@losing
def test_a_late_answer_is_an_answer(start: Callable[[Handler], TinyBroker]) -> None:
    """Answered only when asked again: the answer to the first attempt must count, under its number."""
    numbers: list[int] = []

    class Late(TinyBroker):
        def run(self) -> None:
            while not self.ending.is_set():
                if self.socket.poll(20):
                    identity, header = self.socket.recv_multipart()
                    numbers.append(codec.decode(header)[1])
                    if len(numbers) >= 2:
                        self.socket.send_multipart([identity, codec.encode(m.Ack(), numbers[0])])
            self.socket.close()

    broker = Late(lambda message, payload: None)
    broker.start()
    client = wire.Client(f"127.0.0.1:{broker.port}", HELLO)
    assert client.request(m.Goodbye(reason="x"), timeout_s=60).message == m.Ack()
    assert len(numbers) >= 2
    assert set(numbers) == {numbers[0]}
    client.close()
    broker.ending.set()
    broker.join()


def test_unknown_peer_says_hello_and_sends_again(start: Callable[[Handler], TinyBroker]) -> None:
    known: list[bool] = []

    def handler(message: m.Message, payload: list[bytes]) -> tuple[m.Message, list[bytes]]:
        if isinstance(message, m.Hello):
            known.append(True)
            return m.Ack(), []
        return (m.Ack(reason="done"), []) if known else (m.Refused(code="unknown_peer", reason="who?"), [])

    broker = start(handler)
    client = wire.Client(f"127.0.0.1:{broker.port}", HELLO)
    assert client.request(m.Goodbye(reason="x"), timeout_s=60).message == m.Ack(reason="done")
    assert [message.kind for message in broker.seen] == ["goodbye", "hello", "goodbye"]
    client.close()


def test_refusal_raises_with_code_and_reason(start: Callable[[Handler], TinyBroker]) -> None:
    broker = start(lambda message, payload: (m.Refused(code="full", reason="no room"), []))
    client = wire.Client(f"127.0.0.1:{broker.port}", HELLO)
    with pytest.raises(wire.RefusedError, match="no room") as caught:
        client.request(m.Goodbye(reason="x"), timeout_s=60)
    assert caught.value.code == "full"
    client.close()


def test_nobody_there_is_said_in_time() -> None:
    client = wire.Client("127.0.0.1:9", HELLO)
    with pytest.raises(wire.BrokerUnreachable, match="127.0.0.1:9"):
        client.request(m.Goodbye(reason="x"), timeout_s=0.5)
    client.close()


@pytest.mark.parametrize("kind", [wire.Client, wire.AsyncClient])
def test_a_message_that_the_broker_would_not_take_is_refused_here(kind: type) -> None:
    """Larger than the broker's socket takes, it would never be answered, and all others would wait behind it."""
    rows = [
        m.EvalRow(
            set="s",
            uid="u",
            greedy=m.Scored(verdict="wrong", reward=0.0, tokens=1, text="x" * 2**20),
            sampled=[],
        )
    ]
    large = m.EvalResult(job=1, version=0, era=0, rows=rows * 16, seconds=1.0)

    async def ask() -> None:
        client = kind("127.0.0.1:9", HELLO)
        try:
            answer = client.request(large, timeout_s=None)
            if kind is wire.AsyncClient:
                await answer
        finally:
            client.close()

    with pytest.raises(wire.RefusedError, match="the eval_result was not sent: it has 16778") as caught:
        asyncio.run(ask())
    assert caught.value.code == "malformed"


@losing
def test_async_requests_are_answered_out_of_order(start: Callable[[Handler], TinyBroker]) -> None:
    lost: list[m.Message] = []

    def handler(message: m.Message, payload: list[bytes]) -> tuple[m.Message, list[bytes]] | None:
        if isinstance(message, m.Goodbye) and message.reason == "0" and not lost:
            lost.append(message)
            return None
        return m.Ack(reason=getattr(message, "reason", None)), payload

    broker = start(handler)

    async def many() -> list[str | None]:
        client = wire.AsyncClient(f"127.0.0.1:{broker.port}", HELLO)
        replies = await asyncio.gather(
            *(client.request(m.Goodbye(reason=str(i)), [b"%d" % i], timeout_s=60) for i in range(50))
        )
        assert [bytes(reply.payload[0]) for reply in replies] == [b"%d" % i for i in range(50)]
        client.close()
        return [reply.message.reason for reply in replies]

    assert asyncio.run(many()) == [str(i) for i in range(50)]


def test_async_nobody_there_is_said_in_time() -> None:
    async def ask() -> None:
        client = wire.AsyncClient("127.0.0.1:9", HELLO)
        try:
            with pytest.raises(wire.BrokerUnreachable):
                await client.request(m.Goodbye(reason="x"), timeout_s=0.5)
        finally:
            client.close()

    asyncio.run(ask())


def test_async_hello_is_said_again_until_the_predecessor_is_gone(
    start: Callable[[Handler], TinyBroker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "PREDECESSOR_RETRY_S", 0.01)
    taken = m.Refused(code="not_now", reason="an actor called 'p' is in the run")
    answers = [taken, taken, m.Ack(reason="in"), taken, m.Refused(code="conflict", reason="never")]
    broker = start(lambda message, payload: (answers.pop(0), []))

    async def ask() -> m.Message:
        client = wire.AsyncClient(f"127.0.0.1:{broker.port}", HELLO)
        try:
            welcome = (await client.request(client.hello, timeout_s=60)).message
            with pytest.raises(wire.RefusedError, match="never"):
                await client.request(client.hello, timeout_s=60)
            return welcome
        finally:
            client.close()

    assert asyncio.run(ask()) == m.Ack(reason="in")
    assert {message.process for message in broker.seen} == {wire.PROCESS}, "one for all of a process"


@pytest.fixture
def port() -> Iterator[int]:
    """One on which nobody listens yet."""
    with reserved_port() as number:
        yield number


@losing
def test_what_was_asked_while_the_broker_was_away_is_not_delivered_later(
    start: Callable[..., TinyBroker], port: int
) -> None:
    """A hundred actors, a minute of outage: the broker would be busy with requests that nobody waits for."""
    client = wire.Client(f"127.0.0.1:{port}", HELLO)
    for _ in range(3):
        with pytest.raises(wire.BrokerUnreachable):
            client.request(m.Goodbye(reason="old"), timeout_s=0.5)
    broker = start(lambda message, payload: (m.Ack(), []), port)
    client.request(m.Goodbye(reason="new"), timeout_s=60)
    assert {message.reason for message in broker.seen} == {"new"}
    client.close()


@losing
def test_what_was_asked_while_the_broker_was_away_is_not_delivered_later_async(
    start: Callable[..., TinyBroker], port: int
) -> None:
    async def ask() -> TinyBroker:
        client = wire.AsyncClient(f"127.0.0.1:{port}", HELLO)
        old = (client.request(m.Goodbye(reason="old"), timeout_s=0.5) for _ in range(5))
        assert all(
            isinstance(error, wire.BrokerUnreachable)
            for error in await asyncio.gather(*old, return_exceptions=True)
        )
        broker = start(lambda message, payload: (m.Ack(), []), port)
        await client.request(m.Goodbye(reason="new"), timeout_s=60)
        client.close()
        return broker

    assert {message.reason for message in asyncio.run(ask()).seen} == {"new"}


def announce(path: Path, broker: TinyBroker) -> None:
    path.write_text(json.dumps({"address": f"127.0.0.1:{broker.port}"}))


@losing
def test_a_broker_that_comes_back_elsewhere_is_followed(
    start: Callable[[Handler], TinyBroker], tmp_path: Path
) -> None:
    file = tmp_path / "broker.json"
    first, second = (start(lambda message, payload: (m.Ack(), [])) for _ in range(2))
    announce(file, first)
    client = wire.Client(wire.from_file(file), HELLO)
    client.request(m.Goodbye(reason="a"), timeout_s=60)
    first.ending.set()
    first.join()
    announce(file, second)
    client.request(m.Goodbye(reason="b"), timeout_s=60)
    assert [{message.reason for message in broker.seen} for broker in (first, second)] == [{"a"}, {"b"}]
    client.close()


@losing
def test_a_broker_that_is_not_announced_yet_is_waited_for(
    start: Callable[[Handler], TinyBroker], tmp_path: Path
) -> None:
    file = tmp_path / "broker.json"
    broker = start(lambda message, payload: (m.Ack(), []))

    async def ask() -> m.Message:
        client = wire.AsyncClient(wire.from_file(file), HELLO)
        try:
            with pytest.raises(wire.BrokerUnreachable):
                await client.request(m.Goodbye(reason="too early"), timeout_s=0.3)
            announce(file, broker)
            return (await client.request(m.Goodbye(reason="x"), timeout_s=60)).message
        finally:
            client.close()

    assert asyncio.run(ask()) == m.Ack()


def test_a_hello_says_who_we_are_unless_told_otherwise() -> None:
    ours = wire.hello("observer", "eye", run="r")
    assert (ours.role, ours.peer, ours.run) == ("observer", "eye", "r")
    assert (ours.software, ours.host, ours.pid) == (software_version(), socket.gethostname(), os.getpid())
    assert wire.hello("learner", "learner", pid=7).pid == 7
