"""The next batch arrives whole, however slow the line to the broker is."""

from __future__ import annotations

import pytest
import torch

from common.errors import RunFailedError
from common.messages import Batch, Fetch, GroupId, Message, Payloads, Refused, Take
from common.wire import BrokerUnreachable, RefusedError, Reply
from learner.feed import PATIENCE_S, Feed, Ready, Waiting
from learner.link import HistoryLost
from learner.ranks import Ranks

GROUPS = [GroupId(0, i) for i in range(100)]


class SlowBroker:
    """Stands for a connection on which each group takes `seconds_each`: who waits shorter gets nothing."""

    address = "there:1"

    def __init__(self, seconds_each: float) -> None:
        self.seconds_each = seconds_each
        self.sent = 0

    def request(self, message: Message, *, timeout_s: float, hold_s: float = 0.0) -> Reply:
        if isinstance(message, Take):
            return Reply(Batch(step=message.step, ready=True), [])
        assert isinstance(message, Fetch)
        if len(message.groups) * self.seconds_each > timeout_s:
            raise BrokerUnreachable("no answer")
        self.sent += len(message.groups)
        return Reply(
            Payloads(groups=message.groups),
            [memoryview(b"%d" % g.index) for g in message.groups for _ in range(3)],
        )

    def close(self) -> None:
        pass


@pytest.mark.parametrize(("code", "kind"), [("stale", HistoryLost), ("conflict", RunFailedError)])
def test_a_group_that_the_broker_has_lost_is_cured_by_a_restart(code: str, kind: type[Exception]) -> None:
    class Forgetful(SlowBroker):
        def request(self, message: Message, *, timeout_s: float, hold_s: float = 0.0) -> Reply:
            if isinstance(message, Fetch):
                raise RefusedError(Refused(code=code, reason="why"))
            return super().request(message, timeout_s=timeout_s, hold_s=hold_s)

    feed = Feed(
        Forgetful(0.0), Ranks(0, 1, torch.device("cpu")), 0, 1, lambda batch: GROUPS, lambda *parts: None
    )
    with pytest.raises(kind, match="why"):
        feed.next()
    feed.close()


@pytest.mark.parametrize("seconds_each", [0.0, PATIENCE_S / 20, PATIENCE_S])
def test_payloads_that_take_longer_than_the_patience_still_arrive_once(seconds_each: float) -> None:
    broker = SlowBroker(seconds_each)
    ranks = Ranks(0, 1, torch.device("cpu"))
    feed = Feed(broker, ranks, 0, 1, lambda batch: GROUPS, lambda batch, payloads: payloads)
    waits: list[Waiting] = []
    while not isinstance(item := feed.next(), Ready):
        waits.append(item)
        assert len(waits) < 10, "it would be asked for ever"
    assert {group: bytes(parts[2]) for group, parts in item.work.items()} == {
        g: b"%d" % g.index for g in GROUPS
    }
    assert broker.sent == len(GROUPS), "none twice"
    assert all("payloads of 100 groups from the broker at there:1" in wait.reason for wait in waits)
    feed.close()
