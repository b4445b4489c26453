"""The driver beside an engine that only pretends: order of calls, damage, deadlines, addresses, counting."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch

from actors.weights import EngineDamagedError, TokenVersions, VersionSpan, WeightReceiver
from common.errors import UserError
from common.weights import Manifest, Publisher, Snapshot, Stager
from common.weights.layout import manifest_of
from common.weights.protocol import LinkSpec

RUN = "run"


def weights(seed: int) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(f"w{i}", torch.randn(5, 7, generator=generator)) for i in range(3)]


class PretendedEngine:
    """Has an AsyncLLM's weight calls and real stagers; notes what it is asked to do."""

    def __init__(self, workers: int = 1) -> None:
        self.calls: list[str] = []
        self.errored = False
        self.paused = False
        self.fail_commit = self.hang = False
        self.commit_s = 0.0
        self.weights: dict[str, torch.Tensor] = {}
        parallel = SimpleNamespace(world_size=workers)
        self.vllm_config = SimpleNamespace(parallel_config=parallel, lora_config=None, model_config=None)
        self.engine_core = SimpleNamespace(outputs_queue=asyncio.Queue())
        self.output_processor = SimpleNamespace(request_states={})
        self._stagers: list[Stager] = []

    async def collective_rpc(self, method: str, args=()) -> list:
        if self.hang:
            await asyncio.sleep(100)
        if method.endswith("commit"):
            await asyncio.sleep(self.commit_s)
        return [getattr(self, method.removeprefix("slipstream_weights_"))(*args)]

    def connect(self, spec: dict) -> None:
        self._stagers = [Stager(LinkSpec(**spec), rank) for rank in range(spec["workers"])]

    def stage(self, offer: dict) -> None:
        for stager in self._stagers:
            stager.stage(offer)

    def disconnect(self) -> None:
        for stager in self._stagers:
            stager.close()
        self._stagers = []

    def commit(self, version: int) -> None:
        assert self.paused
        self.calls.append(f"commit {version}")
        if self.fail_commit:
            raise RuntimeError("half of the layers")
        for stager in self._stagers:
            staged = stager.take(version)
            self.weights = {name: tensor.clone() for name, tensor in staged.tensors()}
            staged.release()

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        self.paused = True
        self.calls.append(f"pause {mode} {clear_cache}")

    async def resume_generation(self) -> None:
        self.paused = False
        self.calls.append("resume")

    async def update_weight_version(self, version: str) -> None:
        self.calls.append(f"label {version}")


async def until(condition) -> None:
    async with asyncio.timeout(120):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def receiver_of(engine: PretendedEngine, **options) -> WeightReceiver:
    fixed = {"actor_id": "a", "run_id": RUN, "deadline_s": 30.0, "expected": manifest_of(weights(0))}
    return WeightReceiver(engine, **fixed | options)


def with_publisher(story, **options):
    """Runs `story(publisher)` and closes the publisher."""
    publisher = Publisher(run_id=RUN, deadline_s=30.0, **options)
    try:
        return asyncio.run(story(publisher))
    finally:
        publisher.close()


async def stopped(task: asyncio.Task) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("workers", [1, 2])
def test_a_swap_is_paused_committed_labelled_told_and_resumed_in_this_order(workers):
    engine = PretendedEngine(workers)

    async def story(publisher: Publisher) -> None:
        async def told(version: int) -> None:
            engine.calls.append(f"told {version}")

        receiver = receiver_of(engine, address=publisher.address, on_commit=told)
        task = asyncio.create_task(receiver.run())
        publisher.publish(5, Snapshot.from_tensors(weights(5)))
        await until(lambda: publisher.versions_acked() == {"a": 5})
        meters = receiver.meters()
        assert (meters["version"], meters["pushes"], meters["failures"]) == (5, 1, {})
        assert receiver.origin == publisher.address.rsplit("/", 1)[-1]
        await stopped(task)
        await until(lambda: publisher.meters()["links"] == 0)  # said goodbye

    with_publisher(story)
    assert engine.calls == ["label 0", "pause keep True", "commit 5", "label 5", "told 5", "resume"]
    assert all(torch.equal(engine.weights[name], tensor) for name, tensor in weights(5))


def test_a_failed_commit_leaves_the_engine_paused_and_says_so():
    engine = PretendedEngine()
    engine.fail_commit = True

    async def story(publisher: Publisher) -> None:
        publisher.publish(1, Snapshot.from_tensors(weights(1)))
        receiver = receiver_of(engine, address=publisher.address)
        with pytest.raises(EngineDamagedError, match="version 1 failed: RuntimeError: half of the layers"):
            await asyncio.wait_for(receiver.run(), 120)
        assert receiver.version == 0

    with_publisher(story)
    assert engine.paused
    assert "resume" not in engine.calls


def test_a_dead_engine_is_reported_as_damaged():
    engine = PretendedEngine()

    async def story(publisher: Publisher) -> None:
        engine.connect = lambda spec: (_ for _ in ()).throw(RuntimeError("gone"))
        engine.errored = True
        with pytest.raises(EngineDamagedError, match="dead"):
            await asyncio.wait_for(receiver_of(engine, address=publisher.address).run(), 120)

    with_publisher(story)


def test_an_engine_that_does_not_answer_costs_the_link_and_is_tried_again():
    engine = PretendedEngine()
    engine.hang = True

    async def story(publisher: Publisher) -> None:
        receiver = receiver_of(engine, address=publisher.address, deadline_s=0.3)
        task = asyncio.create_task(receiver.run())
        await until(lambda: receiver.meters()["failures"].get("deadline", 0) >= 1)
        engine.hang, receiver._deadline_s = False, 30.0  # which was short for the sake of the wait
        publisher.publish(1, Snapshot.from_tensors(weights(1)))
        await until(lambda: receiver.version == 1)
        await stopped(task)

    with_publisher(story)


def test_a_commit_outlasts_a_relay_that_occupies_the_device():
    """A relay to a frozen child does so until the deadline of a single wait: the engine is not damaged by that."""
    engine = PretendedEngine()
    engine.commit_s = 1.5

    async def story(publisher: Publisher) -> None:
        publisher.publish(1, Snapshot.from_tensors(weights(1)))
        receiver = receiver_of(engine, address=publisher.address, deadline_s=1.0)
        task = asyncio.create_task(receiver.run())
        await until(lambda: publisher.versions_acked() == {"a": 1})
        assert engine.calls.count("commit 1") == 1
        await stopped(task)

    with_publisher(story)


def test_another_address_is_followed_at_once_and_none_is_waited_out():
    engine = PretendedEngine()

    async def story(first: Publisher) -> None:
        receiver = receiver_of(engine)
        task = asyncio.create_task(receiver.run())
        await receiver.set_address(first.address)
        first.publish(7, Snapshot.from_tensors(weights(7)))
        await until(lambda: receiver.version == 7)
        second = Publisher(run_id=RUN, deadline_s=30.0)
        try:
            await receiver.set_address(second.address)
            second.publish(6, Snapshot.from_tensors(weights(6)))
            await until(lambda: receiver.version == 6)
            await receiver.set_address(None)
            await until(lambda: second.meters()["links"] == 0)
        finally:
            second.close()
        await stopped(task)

    with_publisher(story)


def test_what_does_not_fit_and_adapters_without_lora_are_refused():
    engine = PretendedEngine()

    async def story(publisher: Publisher) -> None:
        receiver = receiver_of(engine, address=publisher.address)
        task = asyncio.create_task(receiver.run())
        publisher.publish(1, Snapshot.from_tensors(weights(1)[:2]))
        await until(lambda: receiver.meters()["failures"] == {"refused": 1})
        adapter = Snapshot.from_tensors(weights(1))
        adapter.manifest = Manifest(adapter.manifest.tensors, "adapter", {"adapter_config": {}})
        publisher.publish(2, adapter)
        await until(lambda: receiver.meters()["failures"] == {"refused": 2})
        publisher.publish(3, Snapshot.from_tensors(weights(3)))
        await until(lambda: receiver.version == 3)
        await stopped(task)

    with_publisher(story)
    assert engine.calls[1:] == ["pause keep True", "commit 3", "label 3", "resume"]


def test_a_salt_names_the_version_and_where_it_came_from():
    engine = PretendedEngine()

    async def story(publisher: Publisher) -> None:
        assert receiver_of(engine, clear_cache=True).cache_salt is None
        receiver = receiver_of(engine, address=publisher.address, clear_cache=False)
        started = receiver.cache_salt
        task = asyncio.create_task(receiver.run())
        publisher.publish(0, Snapshot.from_tensors(weights(1)))  # the number the engine was started with
        await until(lambda: receiver.meters()["pushes"] == 1)
        assert receiver.cache_salt != started
        await stopped(task)

    with_publisher(story)


def test_an_address_that_is_none_is_refused_by_the_constructor():
    with pytest.raises(UserError, match="nonsense"):
        receiver_of(PretendedEngine(), address="nonsense")


def completion(count: int, spans=None) -> SimpleNamespace:
    return SimpleNamespace(token_ids=list(range(count)), weight_versions=spans)


def test_native_labels_become_spans():
    versions = TokenVersions(PretendedEngine(), 0)
    versions.native = True
    label = SimpleNamespace
    native = [label(version="4", start=0, end=3), label(version="5", start=3, end=9)]
    assert versions.spans("r", completion(9, native)) == [VersionSpan(4, 0, 3), VersionSpan(5, 3, 9)]


def test_tokens_are_counted_while_paused_where_the_engine_has_no_labels():
    """An older engine: what is in its output queue is counted before the boundary is noted."""
    state = SimpleNamespace(request_id="0-r", external_req_id="r", detokenizer=SimpleNamespace())
    pending = [2, 3]
    counted = {"tokens": 4}

    def empty() -> bool:
        if pending:  # the output handler takes one batch between two looks
            counted["tokens"] += pending.pop()
        return not pending

    state.detokenizer.num_output_tokens = lambda: counted["tokens"]
    engine = SimpleNamespace(
        engine_core=SimpleNamespace(outputs_queue=SimpleNamespace(empty=empty)),
        output_processor=SimpleNamespace(request_states={"0-r": state}),
    )
    versions = TokenVersions(engine, 3)
    versions.native = False
    versions.begin("r")
    asyncio.run(versions.committed(4))
    asyncio.run(versions.committed(5))  # nothing was sampled from version 4
    assert versions.spans("r", completion(12)) == [VersionSpan(3, 0, 9), VersionSpan(5, 9, 12)]
    versions.begin("s")
    assert versions.spans("s", completion(2)) == [VersionSpan(5, 0, 2)]
