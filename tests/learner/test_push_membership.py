"""The learner forgets the weight meters of actors that the broker says are gone."""

from __future__ import annotations

import threading

import pytest
import torch

from common.weights import Publisher, Snapshot
from common.weights.scripted import ScriptedReceiver
from learner.push import WeightPush
from tests.scripted.wait import until

RUN = "run-1"


@pytest.fixture
def push():
    """A WeightPush on a real publisher, without a DeepSpeed engine around it."""
    made = WeightPush.__new__(WeightPush)
    made._publisher, made._absent = Publisher(run_id=RUN, deadline_s=3.0), set()
    yield made
    made.close()


def test_meters_of_a_crashed_actor_go_away(push: WeightPush) -> None:
    publisher = push._publisher
    receivers = [ScriptedReceiver(publisher.address, RUN, name) for name in ("a", "b")]
    threads = [threading.Thread(target=receiver.run, daemon=True) for receiver in receivers]
    for thread in threads:
        thread.start()
    tensors = {"layer.weight": torch.ones(8, 8)}
    publisher.publish(1, Snapshot.from_tensors(tensors.items(), dtype=torch.float32, bucket_bytes=1024))
    until(lambda: publisher.versions_acked() == {"a": 1, "b": 1})
    assert set(publisher.meters()["versions_behind"]) == {"a", "b"}

    receivers[1].stop.set()  # and the broker has not heard of it since
    threads[1].join(10.0)
    push.keep_actors({"a"})
    assert publisher.actors() >= {"a"}
    push.keep_actors({"a"})
    assert publisher.actors() == {"a"}
    assert set(publisher.meters()["versions_behind"]) == {"a"}
    assert publisher.versions_acked() == {"a": 1}, "who is there keeps its link"
    receivers[0].stop.set()
    threads[0].join(10.0)


def test_an_actor_that_has_just_joined_is_not_dropped(push: WeightPush) -> None:
    """Its link may be made before the broker's next reply names it: one reply without it means nothing."""
    receiver = ScriptedReceiver(push._publisher.address, RUN, "new")
    thread = threading.Thread(target=receiver.run, daemon=True)
    thread.start()
    until(lambda: push._publisher.actors() == {"new"})
    push.keep_actors(set())
    push.keep_actors({"new"})
    push.keep_actors(set())
    assert push._publisher.actors() == {"new"}
    assert push._publisher.meters()["links"] == 1
    receiver.stop.set()
    thread.join(10.0)
