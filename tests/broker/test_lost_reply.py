"""A lease whose reply was lost is granted again, not twice."""

from __future__ import annotations

from pathlib import Path

import zmq

from common import codec
from common import messages as m
from tests.scripted.broker import running_broker, scripted_recipe


class RawPeer:
    """A DEALER that chooses its own request numbers."""

    def __init__(self, address: str) -> None:
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(f"tcp://{address}")

    def ask(self, message: m.Message, number: int) -> m.Message:
        self.socket.send(codec.encode(message, number))
        assert self.socket.poll(10_000)
        reply, answered = codec.decode(self.socket.recv_multipart()[0])
        assert answered == number
        return reply


def test_the_same_lease_request_gets_the_same_groups(tmp_path: Path) -> None:
    recipe = scripted_recipe(tmp_path, run={"steps": 3})
    with running_broker(recipe) as address:
        peer = RawPeer(address)
        peer.ask(m.Hello(role="actor", peer="a", software="0.1.0", host="h", pid=1), 1)
        learner = RawPeer(address)
        learner.ask(m.Hello(role="learner", peer="l", software="0.1.0", host="h", pid=1), 1)
        era = learner.ask(m.Rewind(step=0, version=0), 2).era
        lease = m.Lease(capacity=2, version=0, era=era, wait_s=0.0)
        first, again, other = peer.ask(lease, 2), peer.ask(lease, 2), peer.ask(lease, 3)
        status = learner.ask(m.StatusQuery(), 3).status
        peer.socket.close()
        learner.socket.close()
    assert isinstance(first, m.Grant)
    assert len(first.groups) == 2
    assert again == first
    assert not {a.group for a in other.groups} & {a.group for a in first.groups}
    assert status["ledger"]["leased"] == len(first.groups) + len(other.groups)
