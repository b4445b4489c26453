"""Receivers that join, leave, freeze and die at any moment of a push, and learners that restart."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from receiver_process import ReceiverProcess

import common.weights.disk
import common.weights.dispatch
import common.weights.publisher
from common.errors import RunFailedError, UserError
from common.weights import Address, Cause, LinkError, Publisher, Snapshot
from common.weights.ipc import SharedMemorySource
from common.weights.probe import Probe
from common.weights.protocol import LinkSpec, probe_key
from common.weights.scripted import ScriptedReceiver
from common.weights.store import StoreClient
from tests.scripted.wait import until

RUN = "run-7"
DEADLINE_S = 30.0  # nothing here waits it out: on a busy machine a healthy peer may stand still for seconds
SHORT_S = 3.0  # where one that is frozen or never joins has to be given up


def weights(version: int, size: int = 40) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(version)
    return {f"layer.{i}.weight": torch.randn(64, size, generator=generator) for i in range(12)}


def snapshot(version: int, size: int = 40) -> Snapshot:
    return Snapshot.from_tensors(weights(version, size).items(), dtype=torch.bfloat16, bucket_bytes=20_000)


@pytest.fixture
def publisher():
    made = Publisher(run_id=RUN, deadline_s=DEADLINE_S, degree=2)
    yield made
    made.close()


@pytest.fixture
def impatient():
    """A publisher that soon gives up whoever does not answer."""
    made = Publisher(run_id=RUN, deadline_s=SHORT_S, degree=2)
    yield made
    made.close()


@contextmanager
def processes(tmp_path, publisher, count: int, **options):
    """`count` receivers in processes, connected."""
    started = [start(tmp_path, publisher, index, **options) for index in range(count)]
    try:
        until(lambda: publisher.meters()["links"] == count)
        yield started
    finally:
        for receiver in started:
            receiver.end()


def start(tmp_path, publisher, index: int, **options) -> ReceiverProcess:
    named = {"actor_id": f"a{index}", "node": f"n{index}", "deadline_s": DEADLINE_S}
    return ReceiverProcess(tmp_path, address=publisher.address, run_id=RUN, **named | options)


@contextmanager
def thread_receiver(publisher, **options):
    """One receiver in a thread of this process, stopped on exit."""
    named = {"actor_id": "t0", "deadline_s": DEADLINE_S, "run_id": RUN, "address": publisher.address}
    receiver = ScriptedReceiver(**named | options)
    thread = threading.Thread(target=receiver.run, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        receiver.stop.set()
        thread.join(10)


def assert_holds(receiver: ReceiverProcess, version: int) -> None:
    """The receiver's last version is complete and bit by bit what was sent."""
    assert receiver.commits()[-1] == {"version": version, "checksums": snapshot(version).add_checksums()}


@pytest.mark.parametrize("route", ["gloo", "ipc", "disk"])
@pytest.mark.parametrize("workers", [1, 2])
def test_every_route_brings_every_version_bit_by_bit(tmp_path, route, workers):
    publisher = Publisher(run_id=RUN, route=route, deadline_s=DEADLINE_S, folder=tmp_path)
    seen: dict[int, list] = {}
    try:
        with thread_receiver(
            publisher, workers=workers, on_commit=lambda v, c: seen.setdefault(v, []).append(c)
        ):
            for version in (3, 4, 5):
                publisher.publish(version, snapshot(version))
                until(lambda v=version: publisher.versions_acked() == {"t0": v})
    finally:
        publisher.close()
    assert seen == {version: [snapshot(version).add_checksums()] * workers for version in (3, 4, 5)}
    assert not list(tmp_path.glob("weights-*")), "the disk route leaves nothing behind"


def test_a_tree_of_relays_brings_the_same_bits_to_all(tmp_path, publisher, monkeypatch):
    monkeypatch.setattr(common.weights.dispatch, "PATIENCE_S", DEADLINE_S)  # a slow relay is no frozen one
    with processes(tmp_path, publisher, 7) as receivers:
        for version in (1, 2, 3):
            publisher.publish(version, snapshot(version))
            until(lambda v=version: list(publisher.versions_acked().values()) == [v] * 7)
        for receiver in receivers:
            assert_holds(receiver, 3)
        until(lambda: publisher.meters()["bytes_relayed"] == 3 * 5 * snapshot(1).nbytes)
        meters = publisher.meters()
    assert meters["bytes_sent"] == 3 * 2 * snapshot(1).nbytes, "relays did the rest"
    assert meters["failures"] == {}


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("delay", [0.0, 0.02, 0.1])
def test_killing_or_freezing_a_relay_costs_nobody_else_a_version(tmp_path, impatient, blow, delay):
    """a0 and a1 are relays (degree 2); a0 is struck somewhere in the push."""
    publisher = impatient
    with processes(tmp_path, publisher, 6, deadline_s=SHORT_S) as receivers:
        publisher.publish(1, snapshot(1))
        until(lambda: all(r.version == 1 for r in receivers))
        publisher.publish(2, snapshot(2))
        time.sleep(delay)
        receivers[0].signal(blow)
        until(lambda: all(r.version == 2 for r in receivers[1:]))
        publisher.publish(3, snapshot(3))
        until(lambda: all(r.version == 3 for r in receivers[1:]))
        for receiver in receivers[1:]:
            assert_holds(receiver, 3)
        if blow is signal.SIGSTOP:
            receivers[0].signal(signal.SIGCONT)
            until(lambda: receivers[0].version == 3)
            assert_holds(receivers[0], 3)


def test_a_late_joiner_gets_the_newest_version_and_a_leaver_is_forgotten(tmp_path, publisher):
    publisher.publish(8, snapshot(8))
    with processes(tmp_path, publisher, 1) as (late,):
        until(lambda: late.version == 8)
    with thread_receiver(publisher):
        until(lambda: publisher.versions_acked().get("t0") == 8)
    until(lambda: "t0" not in publisher.versions_acked())


def test_publish_never_waits_for_a_frozen_receiver(tmp_path, publisher):
    """Not a speed test: every wait of the publisher is long, so waiting once would show."""
    with processes(tmp_path, publisher, 2) as receivers:
        receivers[0].signal(signal.SIGSTOP)
        longest = 0.0
        for version in range(1, 9):
            started = time.monotonic()
            publisher.publish(version, snapshot(version))
            longest = max(longest, time.monotonic() - started)
            time.sleep(0.05)
        until(lambda: receivers[1].version == 8)
        assert publisher.meters()["snapshots_held"] <= 2
        assert longest < DEADLINE_S / 3, "an answer to an offer is waited for half of it"


def test_a_snapshot_overtaken_in_mid_transfer_is_given_up_and_the_link_kept(publisher):
    """The version being sent is released under the sender; the receiver is told and takes the newest."""
    reached, hold = threading.Event(), threading.Event()
    big = Snapshot.from_tensors([(f"w{i}", torch.randn(1000)) for i in range(30)], bucket_bytes=4096)
    original = big.buffer

    def slow(index: int) -> torch.Tensor:
        if index == 10 and threading.current_thread().name == "weights-send":
            reached.set()
            hold.wait(DEADLINE_S)
        return original(index)

    with thread_receiver(publisher) as receiver:
        until(lambda: publisher.meters()["links"] == 1)
        big.buffer = slow
        publisher.publish(1, big)
        until(reached.is_set, "the sender is in mid transfer")
        publisher.publish(2, snapshot(2))
        publisher.publish(3, snapshot(3))
        hold.set()
        until(lambda: receiver.version == 3)
        until(lambda: publisher.versions_acked() == {"t0": 3}, "all that the receiver told has been heard")
        assert publisher.meters()["failures"] == {"superseded": 1}
        assert [cause for cause, _ in receiver.errors] == []


def test_receivers_find_a_restarted_learner_by_its_new_address(tmp_path):
    first = Publisher(run_id=RUN, deadline_s=DEADLINE_S)
    with thread_receiver(first) as receiver:
        first.publish(4, snapshot(4))
        until(lambda: receiver.version == 4)
        first.close()
        second = Publisher(run_id=RUN, deadline_s=DEADLINE_S)
        try:
            receiver.address = second.address
            second.publish(3, snapshot(3))  # the learner was rewound
            until(lambda: receiver.version == 3)
        finally:
            second.close()


def test_another_runs_store_and_an_old_token_are_named(publisher):
    other = Address.parse(publisher.address)
    with pytest.raises(LinkError, match="belongs to run run-7, not to mine") as caught:
        StoreClient(other, "mine")
    assert caught.value.cause is Cause.FOREIGN_RUN
    stale = Address(other.route, other.host, other.port, "0" * 32)
    with pytest.raises(LinkError, match="another token"):
        StoreClient(stale, RUN)


def test_a_store_that_nobody_serves_is_an_error_within_the_deadline():
    with pytest.raises(LinkError) as caught:
        StoreClient(Address("gloo", "127.0.0.1", 1, "t"), RUN, deadline_s=0.5)
    assert caught.value.cause is Cause.STORE


@pytest.mark.parametrize(
    ("text", "shown"),
    [("", "''"), ("gloo://h", "gloo://h"), ("http://h:1/t", "http"), ("gloo://h:x/t", "h:x")],
)
def test_an_address_that_is_none_is_refused(text, shown):
    with pytest.raises(UserError, match=shown):
        Address.parse(text)


def test_a_model_that_does_not_fit_is_refused_by_name_and_a_later_one_taken(publisher):
    expected = snapshot(1).manifest
    wrong = Snapshot.from_tensors([*weights(1).items(), ("extra.bias", torch.ones(2))], dtype=torch.bfloat16)
    with thread_receiver(publisher, expected=expected) as receiver:
        publisher.publish(1, wrong)
        until(lambda: publisher.meters()["failures"] == {"refused": 1})
        assert receiver.errors == [
            (Cause.REFUSED, "parameter extra.bias of the push is unknown to the engine's model")
        ]
        publisher.publish(2, snapshot(2))
        until(lambda: receiver.version == 2)


def test_a_damaged_parameter_stops_the_run_by_name(publisher):
    sent = snapshot(1)
    sent.add_checksums()
    name, tensor = list(sent.tensors())[3]
    tensor.view(torch.uint8)[5, 7] ^= 1
    with thread_receiver(publisher) as receiver:
        publisher.publish(1, sent)
        until(lambda: "checksum" in publisher.meters()["failures"])
        assert receiver.version is None
        with pytest.raises(RunFailedError, match=name):
            publisher.publish(2, snapshot(2))


def test_a_truncated_file_is_refused_and_the_next_version_taken(tmp_path):
    publisher = Publisher(run_id=RUN, route="disk", folder=tmp_path, deadline_s=DEADLINE_S)
    prepare = publisher._source.prepare

    def cut(taken: Snapshot) -> None:
        prepare(taken)
        if taken.version == 1:
            (path,) = tmp_path.glob("*/version-1.safetensors")
            path.write_bytes(path.read_bytes()[:-100])

    publisher._source.prepare = cut
    try:
        with thread_receiver(publisher) as receiver:
            publisher.publish(1, snapshot(1))
            until(lambda: receiver.errors)
            assert receiver.errors[0][0] is Cause.TRUNCATED
            assert receiver.version is None
            publisher.publish(2, snapshot(2))
            until(lambda: receiver.version == 2)
    finally:
        publisher.close()


def test_a_full_disk_costs_a_version_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    publisher = Publisher(run_id=RUN, route="disk", folder=tmp_path, deadline_s=DEADLINE_S)
    real = common.weights.disk.save_file

    def full(tensors, path, metadata):
        if metadata["version"] == "1":
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path, metadata)

    monkeypatch.setattr(common.weights.disk, "save_file", full)
    try:
        with thread_receiver(publisher) as receiver:
            publisher.publish(1, snapshot(1))
            until(lambda: publisher.meters()["failures"] == {"unwritten": 1})
            assert not list(tmp_path.glob("*/*"))
            publisher.publish(2, snapshot(2))
            until(lambda: receiver.version == 2)
    finally:
        publisher.close()


def test_what_could_not_be_written_is_offered_once_it_can_be(tmp_path, monkeypatch):
    """It may be the last version, or one that every actor waits for: no newer one would come to replace it."""
    monkeypatch.setattr(common.weights.publisher, "RETRY_S", 0.01)
    publisher = Publisher(run_id=RUN, route="disk", folder=tmp_path, deadline_s=DEADLINE_S)
    real, full = common.weights.disk.save_file, [True] * 3

    def full_at_first(tensors, path, metadata):
        if full:
            full.pop()
            raise OSError(28, "No space left on device")
        real(tensors, path, metadata)

    monkeypatch.setattr(common.weights.disk, "save_file", full_at_first)
    try:
        with thread_receiver(publisher) as receiver:
            publisher.publish(1, snapshot(1))
            until(lambda: receiver.version == 1)
            assert publisher.meters()["failures"] == {"unwritten": 1}, "one version, not one attempt"
    finally:
        publisher.close()


def test_what_killed_learners_left_behind_is_removed(tmp_path):
    (tmp_path / f"weights-{RUN}-0000").mkdir()
    Publisher(run_id=RUN, route="disk", folder=tmp_path).close()
    assert not list(tmp_path.iterdir())
    stale, ours = (
        tmp_path / "slipstream-weights-4194305-t-1",
        tmp_path / f"slipstream-weights-{os.getpid()}-t-1",
    )
    stale.touch(), ours.touch()
    SharedMemorySource("token", tmp_path)
    assert list(tmp_path.iterdir()) == [ours]


def test_a_truncated_bucket_is_refused_and_named(publisher):
    """A sender that breaks off in the middle of a bucket: the rest stays as it was, the footer is missing."""
    sent = snapshot(1)
    publisher._checksum_every = 0
    with thread_receiver(publisher) as receiver:
        until(lambda: publisher.meters()["links"] == 1)
        stamp = sent.stamp

        def cut(version: int) -> None:
            stamp(version)
            sent.buffer(1)[4000:] = 0

        sent.stamp = cut
        publisher.publish(1, sent)
        until(lambda: receiver.errors)
        assert receiver.errors[0][0] is Cause.TRUNCATED
        assert "bucket 1 of version 1" in receiver.errors[0][1]
        assert receiver.version is None


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        ({"route": "smoke"}, r"weights\.route"),
        ({"route": "nccl"}, r"weights\.route"),
        ({"degree": 0}, r"weights\.degree"),
        ({"deadline_s": 0.0}, r"weights\.deadline_s"),
        ({"bind_host": "203.0.113.1"}, r"weights\.bind"),
        ({"bind_host": "0.0.0.0"}, r"weights\.bind"),
    ],
)
def test_a_wrong_setting_is_named(options, setting):
    with pytest.raises(UserError, match=setting):
        Publisher(**{"run_id": RUN} | options)


def test_the_store_listens_on_the_given_address_only(publisher):
    import psutil

    port = Address.parse(publisher.address).port
    bound = {
        c.laddr.ip
        for c in psutil.Process().net_connections("tcp")
        if c.laddr.port == port and c.status == "LISTEN"
    }
    assert bound == {"127.0.0.1"}


def test_a_receiver_of_a_frozen_learner_gives_up_at_its_deadline(tmp_path, publisher):
    """The store client has a deadline although TCPStore has none against a frozen server."""
    spec = LinkSpec(publisher.address, RUN, "x", 1, 1.0)
    client = StoreClient(Address.parse(spec.address), RUN, deadline_s=0.5)
    client.submit(lambda: time.sleep(2))  # stands for a call into a server that does not answer
    with pytest.raises(LinkError, match=r"did not answer within 0\.5 s"):
        client.text("anything")


def test_a_receiver_that_accepts_and_never_joins_is_dropped_at_the_deadline(impatient):
    with (
        thread_receiver(impatient, joins=False, deadline_s=SHORT_S),
        thread_receiver(impatient, actor_id="good") as good,
    ):
        impatient.publish(1, snapshot(1))
        until(lambda: good.version == 1)
        until(lambda: impatient.meters()["failures"].get("deadline", 0) >= 1)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(5))
def test_random_blows_for_a_while_and_then_everybody_has_the_newest(tmp_path, impatient, seed):
    publisher, dice = impatient, random.Random(seed)
    receivers = {index: start(tmp_path, publisher, index, deadline_s=SHORT_S) for index in range(6)}
    try:
        for version in range(1, 31):
            publisher.publish(version, snapshot(version))
            index = dice.randrange(6)
            blow = dice.choice(["kill", "freeze", "thaw", "none"])
            if blow == "kill":
                receivers[index].end()
                receivers[index] = start(tmp_path, publisher, index, deadline_s=SHORT_S)
            elif blow != "none" and receivers[index].alive:
                receivers[index].signal(signal.SIGSTOP if blow == "freeze" else signal.SIGCONT)
            time.sleep(dice.uniform(0.0, 0.3))
        for receiver in receivers.values():
            receiver.signal(signal.SIGCONT)
        publisher.publish(31, snapshot(31))
        until(lambda: all(receiver.version == 31 for receiver in receivers.values()))
        for receiver in receivers.values():
            assert_holds(receiver, 31)
    finally:
        for receiver in receivers.values():
            receiver.end()


def test_the_probe_of_a_version_comes_with_it_and_goes_with_it(publisher):
    receiver = ScriptedReceiver(publisher.address, RUN, "a", deadline_s=DEADLINE_S)
    thread = threading.Thread(target=receiver.run, daemon=True)
    thread.start()
    try:
        made = {version: Probe((1, 2, version), (-0.5, -version / 3)) for version in (1, 2)}
        for version, probe in made.items():
            publisher.publish(version, snapshot(version), probe)
            until(lambda version=version: version in receiver.probes)
        assert receiver.probes == made
        publisher.publish(3, snapshot(3))
        until(lambda: receiver.version == 3 and publisher.meters()["snapshots_held"] == 1)
        client = StoreClient(Address.parse(publisher.address), RUN)
        assert [client.text_if_set(probe_key(push)) for push in range(3)] == [None] * 3
        client.close()
    finally:
        receiver.stop.set()
        thread.join(5)


def test_room_is_made_before_another_version_is_built(publisher):
    first, second = snapshot(1), snapshot(2)
    publisher.make_room()
    publisher.publish(1, first)
    publisher.make_room()
    assert not first.released
    publisher.publish(2, second)
    publisher.make_room()
    assert (first.released, second.released) == (True, False)
