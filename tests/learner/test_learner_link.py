"""The learner's line to the broker: what it says is well-formed, and its failure is the run's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec
import pytest

from common.codec import decode, encode
from common.errors import RunFailedError
from common.messages import Ack, Heartbeat, Message, Pin, Pulse, Refused, Status, StatusQuery
from common.wire import BrokerUnreachable, RefusedError, Reply
from learner.link import BrokerLink
from tests.scripted.wait import until

PULSE = Pulse(step=0, version=0, era=0, weights=None, command="run")


class Broker:
    """Stands for the connection: checks what is said as a broker does, and answers."""

    def __init__(self, answer: Callable[[Message], Message] | None = None) -> None:
        self.heard: list[Message] = []
        self.answer = answer or (lambda message: PULSE if isinstance(message, Heartbeat) else Ack())

    def request(self, message: Message, timeout_s: float) -> Reply:
        self.heard.append(decode(encode(message, 1))[0])
        reply = self.answer(message)
        if isinstance(reply, Refused):
            raise RefusedError(reply)
        return Reply(reply, [])

    def close(self) -> None:
        pass


@pytest.fixture
def connect() -> Iterator[Callable[[Broker], BrokerLink]]:
    links: list[BrokerLink] = []

    def go(broker: Broker) -> BrokerLink:
        links.append(BrokerLink(broker, 0.01))
        return links[-1]

    yield go
    for link in links:
        link.close("over", 0.0)


def test_a_long_reason_for_waiting_makes_a_heartbeat_that_the_broker_takes(connect) -> None:
    broker = Broker()
    link = connect(broker)
    link.be(
        "waiting for groups", "waiting for " + ", ".join(f"a-node-with-a-long-name-{i}" for i in range(20))
    )
    until(lambda: any(beat.waiting_for for beat in broker.heard), "a heartbeat that says whom we wait for")
    link.check()


def test_whatever_ends_the_thread_ends_the_run(connect) -> None:
    link = connect(Broker(lambda message: msgspec.structs.replace(PULSE, actors=[])))

    def broken(living: set[str]) -> None:
        raise KeyError("a defect")

    link.follow_actors(broken)
    until(lambda: link.failure, "the failure")
    with pytest.raises(KeyError, match="a defect"):
        link.check()
    link.post(Pin(step=0, path="x"))
    assert not link.flush(0.1), "nobody delivers it any more"


def test_what_the_evaluations_found_is_asked_for_once_and_holds_up_no_commit(connect) -> None:
    """A status too large for a message is never answered: what must arrive is not kept waiting behind it."""
    answers = [None, Status(status={"accuracy": [(0, 0.25), (4, 0.5)]})]

    def answer(message: Message) -> Message:
        if not isinstance(message, StatusQuery):
            return PULSE if isinstance(message, Heartbeat) else Ack()
        found = answers.pop(0)
        if found is None:
            raise BrokerUnreachable("no answer")
        return found

    broker = Broker(answer)
    link = connect(broker)
    link.ask_accuracy()
    link.post(Pin(step=0, path="x"))
    until(lambda: len(answers) == 1, "it asks")
    assert link.flush(10.0)
    link.ask_accuracy()
    until(lambda: link.accuracy == {0: 0.25, 4: 0.5}, "the answer")


def test_a_stop_is_heard_while_the_broker_takes_nothing_in(connect) -> None:
    """Its disk is full: a commit is refused again and again."""
    full = Refused(code="full", reason="the broker's disk is full")
    stop = msgspec.structs.replace(PULSE, command="stop")
    broker = Broker(lambda message: stop if isinstance(message, Heartbeat) else full)
    link = connect(broker)
    link.post(Pin(step=0, path="x"))
    until(lambda: any(isinstance(message, Pin) for message in broker.heard), "the message")
    first = next(i for i, message in enumerate(broker.heard) if isinstance(message, Pin))
    until(
        lambda: any(isinstance(m, Heartbeat) for m in broker.heard[first:]),
        "a heartbeat between two attempts",
    )
    until(lambda: link.command == "stop", "the order")
    assert not link.flush(0.0)


def test_a_refusal_ends_the_run_with_its_reason(connect) -> None:
    link = connect(
        Broker(lambda m: Refused(code="conflict", reason="no such step") if m.kind == "pin" else PULSE)
    )
    link.post(Pin(step=7, path="x"))
    until(lambda: link.failure, "the refusal")
    with pytest.raises(RunFailedError, match="no such step"):
        link.check()


def test_a_learner_that_another_has_displaced_ends_and_says_so(connect) -> None:
    refused = Refused(code="not_now", reason="a learner is in the run already (process 2 on node8)")
    link = connect(Broker(lambda message: refused))
    until(lambda: link.failure, "the failure")
    with pytest.raises(RunFailedError, match="a learner is in the run already"):
        link.check()
