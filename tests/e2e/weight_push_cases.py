"""Weights pushed into the real engine: every token is what its labelled version would have said."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest
import torch
from push_engine import (
    Response,
    prompts,
    respond,
    running_engine,
    tiny_model,
    token_logprobs,
    until,
)

from actors.weights import EngineDamagedError, WeightReceiver
from common.weights import Publisher, Snapshot

pytestmark = pytest.mark.e2e

TOLERANCE = 1e-4  # nats, float32
LENGTH = 240
ACTOR = "actor-0"


def snapshot(model: torch.nn.Module) -> Snapshot:
    return Snapshot.from_tensors(model.named_parameters(), bucket_bytes=1 << 16)


@contextmanager
def publishing(**options):
    publisher = Publisher(run_id="run", deadline_s=60.0, checksum_every=2, **options)
    try:
        yield publisher
    finally:
        publisher.close()


@asynccontextmanager
async def following(engine, address: str | None, **options):
    """A receiver of `engine` that follows a publisher; its task must still run at the end."""
    receiver = WeightReceiver(
        engine, actor_id=ACTOR, run_id="run", address=address, deadline_s=60.0, **options
    )
    task = asyncio.create_task(receiver.run())
    try:
        yield receiver
        assert not task.done(), task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def push(publisher: Publisher, version: int, model: torch.nn.Module) -> None:
    publisher.publish(version, snapshot(model))
    await until(lambda: publisher.versions_acked().get(ACTOR) == version)


def start_responses(engine, receiver, count: int, length: int = LENGTH) -> list[asyncio.Task]:
    return [
        asyncio.create_task(respond(engine, receiver, f"r{seed}", prompt, length))
        for seed, prompt in enumerate(prompts(count))
    ]


def most_tokens(engine, running: list[asyncio.Task]) -> int:
    """Tokens of the request that is furthest."""
    if any(task.done() for task in running):
        return LENGTH
    states = engine.output_processor.request_states.values()
    return max((state.detokenizer.num_output_tokens() for state in states), default=0)


def worst_difference(response: Response, models, shift: int = 0) -> float:
    """Largest difference to the log-probabilities of the labelled versions (plus `shift`: a control)."""
    worst = 0.0
    for span in response.spans:
        reference = token_logprobs(models[(span.version + shift) % len(models)], response)
        recorded = torch.tensor(response.logprobs[span.start : span.end])
        worst = max(worst, (reference[span.start : span.end] - recorded).abs().max().item())
    return worst


def assert_each_token_agrees(responses: list[Response], models) -> None:
    for response in responses:
        assert response.finish_reason == "length"
        assert len(response.tokens) == LENGTH
        assert response.spans[0].start == 0
        assert response.spans[-1].end == LENGTH
    assert max(worst_difference(r, models) for r in responses) <= TOLERANCE
    assert min(worst_difference(r, models, shift=1) for r in responses) > 0.1, "a wrong version must show"


async def push_six_times_under_load(folder: Path, models, *, prepared: bool, **engine_options):
    with publishing() as publisher:
        async with (
            running_engine(folder, **engine_options) as engine,
            following(engine, publisher.address) as receiver,
        ):
            running = start_responses(engine, receiver, 12)
            for version, model in enumerate(models[1:], start=1):
                await until(lambda least=10 * version: most_tokens(engine, running) >= least)
                await push(publisher, version, model)
            finished = list(await asyncio.gather(*running))
            greedy = await respond(engine, receiver, "greedy", [5, 6, 7], 32, temperature=0.0)
            assert receiver.meters()["prepared"] is prepared
            return finished, greedy, publisher.meters()


async def greedy_from_fresh_engine(folder: Path, model) -> list[int]:
    model.save_pretrained(folder)
    async with running_engine(folder) as engine:
        return (await respond(engine, None, "greedy", [5, 6, 7], 32, temperature=0.0)).tokens


def prove(folder: Path, *, tied: bool, prepared: bool = True, **engine_options) -> None:
    models = [tiny_model(seed, tied=tied) for seed in range(7)]
    models[0].save_pretrained(folder / "first")
    finished, greedy, meters = asyncio.run(
        push_six_times_under_load(folder / "first", models, prepared=prepared, **engine_options)
    )
    assert_each_token_agrees(finished, models)
    assert max(len(r.spans) for r in finished) >= 4, "requests must live through several pushes"
    assert greedy.tokens == asyncio.run(greedy_from_fresh_engine(folder / "last", models[-1]))
    assert meters["versions_behind"] == {ACTOR: 0}
    assert meters["failures"] == {}
    assert meters["stopped_ms"][ACTOR] > 0
    assert meters["bytes_sent"] == 6 * snapshot(models[0]).nbytes


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_token_in_flight_agrees_with_its_version(tmp_path, tied):
    prove(tmp_path, tied=tied)


@pytest.mark.nightly
def test_every_token_agrees_with_two_tensor_parallel_workers(tmp_path):
    prove(tmp_path, tied=True, tensor_parallel=2)


@pytest.mark.nightly
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_token_agrees_after_the_engines_own_reload(tmp_path, tied, monkeypatch):
    """What GPUs and compiled engines do; here the preparing is taken away (the engine is forked)."""
    monkeypatch.setattr("actors.weights.worker.prepare", lambda *_: None)
    prove(tmp_path, tied=tied, prepared=False)


def test_kept_cache_pinned_evaluations_and_pushes_that_do_not_fit(tmp_path):
    """One engine for several short stories: starting it is what costs."""
    models = [tiny_model(seed, tied=False) for seed in range(4)]
    models[0].save_pretrained(tmp_path)
    asyncio.run(_short_stories(tmp_path, models))


async def _short_stories(folder: Path, models) -> None:
    committed: list[int] = []
    with publishing() as publisher:
        async with (
            running_engine(folder) as engine,
            following(engine, publisher.address, clear_cache=False, on_commit=committed.append) as receiver,
        ):
            await _new_prompts_never_meet_an_old_cache(engine, receiver, publisher, models)
            await _a_pinned_evaluation_sees_one_version(engine, receiver, publisher, models)
            await _a_push_that_does_not_fit_is_refused(engine, receiver, publisher, models)
    assert committed == [1, 2, 3]


async def _new_prompts_never_meet_an_old_cache(engine, receiver, publisher, models) -> None:
    prompt = [2 + i % 120 for i in range(400)]  # several cache blocks (128 tokens each on CPU)
    before = await respond(engine, receiver, "before", prompt, 8)
    await push(publisher, 1, models[1])
    after = await respond(engine, receiver, "after", prompt, 8)
    assert worst_difference(before, models) <= TOLERANCE
    assert worst_difference(after, models) <= TOLERANCE
    unsalted = await respond(engine, receiver, "unsalted", prompt, 8, salted=False)
    await push(publisher, 2, models[2])
    stale = await respond(engine, receiver, "stale", prompt, 8, salted=False)
    assert unsalted.spans[0].version == 1
    assert worst_difference(stale, models) > 0.1, "without the salt the old cache is met: the control"


async def _a_pinned_evaluation_sees_one_version(engine, receiver, publisher, models) -> None:
    async with receiver.pinned() as version:
        publisher.publish(3, snapshot(models[3]))
        await until(lambda: publisher._dispatcher.links and _state(publisher) == "held")
        response = await respond(engine, receiver, "pinned", [5, 6, 7], 40)
        assert [span.version for span in response.spans] == [version]
        assert receiver.version == version
    await until(lambda: publisher.versions_acked().get(ACTOR) == 3)
    assert worst_difference(response, models) <= TOLERANCE


async def _a_push_that_does_not_fit_is_refused(engine, receiver, publisher, models) -> None:
    running = start_responses(engine, receiver, 2)
    publisher.publish(4, snapshot(tiny_model(4, tied=False, layers=3)))
    await until(lambda: publisher.meters()["failures"].get("refused") == 1)
    publisher.publish(5, snapshot(tiny_model(4, tied=False).bfloat16()))
    await until(lambda: publisher.meters()["failures"].get("refused") == 2)
    assert_each_token_agrees(list(await asyncio.gather(*running)), models)
    assert receiver.version == 3


def _state(publisher: Publisher) -> str:
    (link,) = publisher._dispatcher.links.values()
    return link.state.value


def test_learners_that_freeze_die_and_restart_do_not_stop_generation(tmp_path):
    models = [tiny_model(seed, tied=True) for seed in range(4)]
    models[0].save_pretrained(tmp_path)
    asyncio.run(_outlive_learners(tmp_path, models))


async def _outlive_learners(folder: Path, models) -> None:
    async with running_engine(folder) as engine, following(engine, None) as receiver:
        with learner_process(first=1, seeds=[1, 2]) as first:
            await receiver.set_address(first.address)
            running = start_responses(engine, receiver, 8)
            first.publish()
            await until(lambda: receiver.version == 1)
            first.publish()
            first.process.send_signal(signal.SIGSTOP)  # somewhere in a push
            await asyncio.sleep(0.5)
            frozen = await respond(engine, receiver, "while-frozen", [9, 8, 7], 40)
            assert len(frozen.tokens) == 40
        with learner_process(first=2, seeds=[2, 3]) as second:
            await receiver.set_address(second.address)
            second.publish()
            await until(lambda: receiver.version == 2)
            second.publish()
            await until(lambda: receiver.version == 3)
            last = await respond(engine, receiver, "last", [4, 5, 6], LENGTH)
        assert_each_token_agrees([*await asyncio.gather(*running), last], models)
        assert [span.version for span in last.spans] == [3]


class _Learner:
    """See learner_process.py."""

    def __init__(self, first: int, seeds: list[int]) -> None:
        here = Path(__file__).parent
        environment = os.environ | {"PYTHONPATH": f"{here.parent.parent}:{here}"}
        program = [sys.executable, str(here / "learner_process.py"), "run", str(first)]
        self.process = subprocess.Popen(
            [*program, ",".join(map(str, seeds))],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.address = self.process.stdout.readline().strip()

    def publish(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline()


@contextmanager
def learner_process(first: int, seeds: list[int]):
    learner = _Learner(first, seeds)
    try:
        yield learner
    finally:
        learner.process.kill()
        learner.process.wait()


def test_an_adapter_is_pushed_alone_and_a_bad_one_damages_only_this_engine(tmp_path):
    """Adapters are replaced in place under requests in flight; a commit that fails ends the receiver."""
    base = tiny_model(0, tied=True)
    base.save_pretrained(tmp_path)
    asyncio.run(_push_adapters(tmp_path, base))


async def _push_adapters(folder: Path, base) -> None:
    from learner.snapshot import take_snapshot

    policies = [_adapted(base, seed) for seed in range(1, 4)]
    merged = [base, *(_merged(policy) for policy in policies)]
    lora = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1}
    with publishing() as publisher:
        async with running_engine(folder, **lora) as engine:
            receiver = WeightReceiver(engine, actor_id=ACTOR, run_id="run", address=publisher.address)
            await receiver.prepare()
            task = asyncio.create_task(receiver.run())
            running = start_responses(engine, receiver, 4)
            for version in (1, 2, 3):
                await asyncio.sleep(0.2)
                publisher.publish(version, take_snapshot(policies[version - 1], adapters_only=True))
                await until(lambda v=version: receiver.version == v)
            assert_each_token_agrees(list(await asyncio.gather(*running)), merged)
            too_high = _adapted(base, 9, rank=16)
            publisher.publish(4, take_snapshot(too_high, adapters_only=True))
            with pytest.raises(EngineDamagedError, match="version 4"):
                await asyncio.wait_for(task, 30)


def _adapted(base, seed: int, rank: int = 4):
    import copy

    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def _merged(policy):
    import copy

    return copy.deepcopy(policy).merge_and_unload().eval()
