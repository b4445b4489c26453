"""Weights pushed into the real engine: every token is what its labelled version would have said."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress

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

from actors.weights import WeightReceiver
from common.weights import Publisher, Snapshot

pytestmark = pytest.mark.e2e

TOLERANCE = 1e-4  # nats, float32


def snapshot(model: torch.nn.Module) -> Snapshot:
    return Snapshot.from_tensors(model.named_parameters(), bucket_bytes=1 << 16)


@asynccontextmanager
async def followed(engine, publisher: Publisher, **options):
    """A receiver that follows `publisher`; a damaged engine fails the test."""
    receiver = WeightReceiver(
        engine, actor_id="actor-0", run_id="run", address=publisher.address, deadline_s=20.0, **options
    )
    task = asyncio.create_task(receiver.run())
    try:
        yield receiver
        assert not task.done(), task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def push_under_load(folder, models, *, clear_cache: bool, **engine_options):
    """Pushes all models but the first while requests are in flight; returns them and a last greedy response."""
    publisher = Publisher(run_id="run", deadline_s=20.0, checksum_every=2)
    try:
        async with (
            running_engine(folder, **engine_options) as engine,
            followed(engine, publisher, clear_cache=clear_cache) as receiver,
        ):
            running = [
                asyncio.create_task(respond(engine, receiver, f"r{i}", prompt, 240))
                for i, prompt in enumerate(prompts(12))
            ]
            for version, model in enumerate(models[1:], start=1):
                await asyncio.sleep(0.15)
                publisher.publish(version, snapshot(model))
                await until(lambda v=version: publisher.versions_acked().get("actor-0") == v)
            finished = list(await asyncio.gather(*running))
            greedy = await respond(engine, receiver, "greedy", [5, 6, 7], 32, temperature=0.0)
            return finished, greedy, publisher.meters()
    finally:
        publisher.close()


def worst_difference(response: Response, models, shift: int = 0) -> float:
    """Largest difference to the log-probabilities of the labelled versions (plus `shift`: a control)."""
    worst = 0.0
    for span in response.spans:
        model = models[(span.version + shift) % len(models)]
        reference = token_logprobs(model, response)[span.start : span.end]
        worst = max(
            worst, (reference - torch.tensor(response.logprobs[span.start : span.end])).abs().max().item()
        )
    return worst


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_token_in_flight_agrees_with_its_version(tmp_path, tied):
    models = [tiny_model(seed, tied=tied) for seed in range(7)]
    models[0].save_pretrained(tmp_path)
    finished, greedy, meters = asyncio.run(push_under_load(tmp_path, models, clear_cache=True))

    assert all(r.finish_reason == "length" and len(r.tokens) == 240 for r in finished)
    assert max(len(r.spans) for r in finished) >= 4, "requests must live through several pushes"
    assert max(worst_difference(r, models) for r in finished) <= TOLERANCE
    assert min(worst_difference(r, models, shift=1) for r in finished) > 0.1, "a wrong version must show"
    assert greedy.tokens == greedy_reference(models[-1], greedy)
    assert meters["versions_behind"] == {"actor-0": 0}
    assert meters["failures"] == {}


@torch.no_grad()
def greedy_reference(model, response: Response) -> list[int]:
    ids = torch.tensor([response.prompt])
    return model.generate(ids, max_new_tokens=32, min_new_tokens=32, do_sample=False)[
        0, ids.shape[1] :
    ].tolist()
