"""The wait for a GPU by script, the streams of transfers, and groups that are closed under a transfer."""

from __future__ import annotations

import os
import threading
from itertools import count

import pytest
import torch

import common.weights.sender
from common.recipe.schema import WeightsSection
from common.weights import Cause, LinkError, Snapshot, Stager
from common.weights.group import ERROR_S, JOIN_S, wait_for_device
from common.weights.protocol import Hop, LinkSpec, Offer
from common.weights.sender import LinkSender
from common.weights.store import Address

TIMEOUT = 30.0


class Device:
    """A clock, a work and an event that follow a script; times in seconds, None: never."""

    def __init__(self, ended: float | None, done: float | None) -> None:
        self.now = 0.0
        self._ended, self._done = ended, done

    def wait(self) -> None:
        wait_for_device(
            lambda: self._ended is not None and self.now >= self._ended,
            lambda: self._done is not None and self.now >= self._done,
            TIMEOUT,
            clock=lambda: self.now,
            sleep=self._sleep,
        )

    def _sleep(self, seconds: float) -> None:
        assert seconds < 0.01
        self.now += 0.01


@pytest.mark.parametrize(
    ("ended", "done"), [(0.0, 0.0), (5.0, 5.02), (5.0, 5.0 + 0.9 * ERROR_S), (None, 29.0)]
)
def test_a_transfer_is_complete_when_the_device_is_through(ended, done):
    device = Device(ended, done)
    device.wait()
    assert device.now == pytest.approx(done, abs=0.02)


def test_an_error_of_nccl_is_not_completion():
    """Its work then says that it is completed, while the kernel waits for the dead peer for ever."""
    device = Device(ended=5.0, done=None)
    with pytest.raises(LinkError, match="error") as caught:
        device.wait()
    assert caught.value.cause is Cause.PEER_LOST
    assert device.now == pytest.approx(5.0 + ERROR_S, abs=0.05)


@pytest.mark.parametrize("ended", [None, TIMEOUT - 0.5 * ERROR_S])
def test_a_frozen_peer_costs_the_deadline(ended):
    device = Device(ended, done=None)
    with pytest.raises(LinkError, match="30 s") as caught:
        device.wait()
    assert caught.value.cause is Cause.DEADLINE
    assert device.now == pytest.approx(TIMEOUT, abs=0.05)


def test_a_join_over_nccl_has_the_default_deadline():
    """torch takes half an hour, during which the communicator cannot be aborted."""
    assert WeightsSection().deadline_s == JOIN_S
    assert "TORCH_NCCL_NONBLOCKING_TIMEOUT" in os.environ


def test_every_edge_of_a_receiver_has_a_stream_of_its_own_that_it_keeps(monkeypatch):
    """Else a relay would run on the model's stream of GPU 0, or, after 32 pushes, on that of the next version."""
    used, numbers, spare = [], count(), []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: spare.append(device))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: (device, priority, next(numbers)))
    monkeypatch.setattr(torch.cuda, "set_stream", used.append)
    device = torch.device("cuda", 3)
    stager = Stager(LinkSpec("nccl://127.0.0.1:1/token", "run", "a.0", 1, 0.1), 0, device)
    try:
        for edge in ("edge/a.0/b.0", "edge/a.0/c.0", "edge/a.0/b.0"):
            offer = Offer(0, 1, "", 1, 1, {}, None, (), checksums=False, deadline_s=0.1)
            thread = threading.Thread(target=stager._relay, args=(Copy(), offer, Hop(edge, 1)))
            thread.start()
            thread.join(10.0)
    finally:
        stager.close()
    assert set(spare) == {device}
    first, other, again = used[-3:]
    assert first == again != other
    assert len(set(used)) == 3, "the receiving thread's, and one per edge"
    assert all(stream[:2] == (device, -1) for stream in used)


class Copy:
    """Stands for a staged version."""

    def release(self) -> None:
        pass


class StuckGroup:
    """A group whose peer is frozen: it opens when `opens` is set and sends for ever, until it is closed."""

    def __init__(self, opens: threading.Event) -> None:
        self.opening, self.sending, self.closed = threading.Event(), threading.Event(), threading.Event()
        self._opens = opens
        self.device = torch.device("cpu")

    def open(self, *_: object) -> StuckGroup:
        self.opening.set()
        assert self._opens.wait(10.0)
        return self

    def broadcast(self, buffer: torch.Tensor, timeout: float) -> None:
        del buffer, timeout
        self.sending.set()
        assert self.closed.wait(10.0)
        raise LinkError(Cause.PEER_LOST, "the group was closed")

    def close(self) -> None:
        self.closed.set()


@pytest.mark.parametrize("moment", ["opening", "sending"])
def test_a_sender_that_is_closed_aborts_its_transfer(monkeypatch, moment):
    """On a GPU the kernel of a frozen link would occupy the learner's device until its deadline."""
    opens = threading.Event()
    group = StuckGroup(opens)
    monkeypatch.setattr(common.weights.sender, "Group", group.open)
    monkeypatch.setattr(common.weights.sender, "connect", lambda *_: torch.distributed.HashStore())
    address = Address.parse("gloo://127.0.0.1:1/token")
    sender = LinkSender(address, "a.0", 1, torch.device("cpu"), TIMEOUT, lambda report: None)
    snapshot = Snapshot.from_tensors([("w", torch.ones(3))])
    snapshot.stamp(1)
    sender.send(0, snapshot)
    if moment == "sending":
        opens.set()
    assert getattr(group, moment).wait(10.0)
    sender.close()
    opens.set()
    assert group.closed.wait(10.0)
