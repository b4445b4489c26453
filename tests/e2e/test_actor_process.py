"""The actor process against a scripted broker, with the real engine: what it publishes, and how it leaves."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from actor_world import EOS, ActorProcess, ScriptedBroker, small_recipe, until, write_policy

from common.errors import EXIT_RESTART, EXIT_RUN_FAILED
from common.messages import Ack, EvalJob, EvalQuestion, Refused
from deploy.launch.supervisor import first_error
from tests.scripted.wait import alive

pytestmark = pytest.mark.e2e

PROMPTS = [f"{a}+{b}=" for a in range(6) for b in range(4)]


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    return write_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def world(policy, tmp_path, request):
    """A broker and an actor that has joined it; `request.param` replaces settings of the recipe."""
    broker = ScriptedBroker(small_recipe(policy, **getattr(request, "param", {})))
    actor = ActorProcess(broker.address, tmp_path / "actor.log")
    yield broker, actor
    actor.end()
    broker.close()


def ask(broker: ScriptedBroker, prompts=PROMPTS) -> None:
    broker.to_lease.extend({"problem": prompt, "answer": "7"} for prompt in prompts)


def evaluation() -> EvalJob:
    questions = [EvalQuestion(set="s", uid=p, question={"problem": p, "answer": "7"}) for p in PROMPTS]
    return EvalJob(job=3, requested=0, questions=questions, samples=2, temperature=0.8, max_tokens=8)


def test_publishes_what_was_sampled_through_an_outage_and_leaves_in_order(world, policy):
    broker, actor = world
    refusals = iter([None, None, Refused(code="not_now", reason="the commit is not here yet")])
    broker.publish_reply = lambda message: next(refusals, Ack(status="accepted"))
    ask(broker)
    broker.evaluation = evaluation()
    until(lambda: len(broker.groups) == len(PROMPTS) and broker.received["eval_result"], actor)

    assert len({header.group for header, _ in broker.groups}) == len(PROMPTS)
    for header, payload in broker.groups:
        check_group(header, payload, policy)
    check_evaluation(broker.received["eval_result"][0])
    check_hello_and_heartbeats(broker)
    family = actor.family()
    actor.process.terminate()
    assert actor.wait() == 0
    assert broker.received["goodbye"][-1].reason == "leaving"
    until(lambda: not alive(family))
    noise = ("terminate called", "Exception ignored", "nanobind", "Traceback")
    assert not [line for line in actor.log.read_text().splitlines() if any(word in line for word in noise)]


def test_a_frozen_engine_shows_its_stack_and_a_broken_model_its_cause(world, policy, tmp_path):
    broker, actor = world
    until(lambda: broker.received["lease"], actor)
    engine = engine_of(actor)
    os.kill(engine, signal.SIGSTOP)
    broker.dump_stacks = "first"
    until(lambda: broker.received["stacks"], actor)
    (sent,) = broker.received["stacks"]
    assert sent.request == "first"
    assert "in beat" in sent.text, "the actor's own tasks"
    assert f"=== process {engine} (stopped)" in sent.text
    assert "run_busy_loop" in sent.text, "where the engine stood"
    os.kill(engine, signal.SIGCONT)

    broken = shutil.copytree(policy, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    broker.recipe["model"]["path"] = str(broken)
    unlucky = ActorProcess(broker.address, tmp_path / "unlucky.log", name="unlucky")
    assert unlucky.wait() == EXIT_RUN_FAILED
    said = first_error(unlucky.log)
    assert said.startswith(f"vLLM could not start on '{broken}': SafetensorError: "), said


def engine_of(actor: ActorProcess) -> int:
    """Process number of the actor's engine: the child that is not one of the verifier's processes."""
    helpers = ("multiprocessing.spawn", "multiprocessing.resource_tracker")
    lines = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in actor.family() - {actor.process.pid}}
    (engine,) = [pid for pid, line in lines.items() if not any(name in line for name in helpers)]
    return engine


def check_group(header, payload, policy: Path) -> None:
    """Sizes agree, the prompt is the question, responses end as they say."""
    prompt, tokens, logprobs = payload
    assert [len(part) for part in payload] == [header.prompt_tokens, *2 * [header.response_tokens]]
    assert decode(policy, prompt) == PROMPTS[header.group.index]
    assert header.actor == "actor"
    assert len(header.responses) == 4
    assert (logprobs <= 0).all()
    assert np.isfinite(logprobs).all()
    ends = np.cumsum([response.tokens for response in header.responses])
    for response, end in zip(header.responses, ends, strict=True):
        assert response.versions == [(0, response.tokens)]
        assert (tokens[end - 1] == EOS) == (response.finish == "stop")
        assert (response.verdict == "truncated") == (response.finish == "length")
        assert response.finish == "stop" or response.tokens == 32


def check_evaluation(result) -> None:
    assert (result.job, result.version, result.era) == (3, 0, 0)
    assert [row.uid for row in result.rows] == PROMPTS
    assert all(len(row.sampled) == 2 for row in result.rows)
    assert sum(row.greedy.text is not None for row in result.rows) == 4


def check_hello_and_heartbeats(broker: ScriptedBroker) -> None:
    observer, actor = broker.received["hello"]
    assert (observer.role, actor.role, actor.peer, actor.run) == ("observer", "actor", "actor", "test")
    assert len(actor.tokenizer) == 64
    beat = broker.received["heartbeat"][-1]
    assert {"tokens_per_s", "kv_use", "cpu_cores", "rss_mb", "verifier_queue"} <= set(beat.telemetry)
    assert max(b.telemetry.get("generated_groups", 0) for b in broker.received["heartbeat"]) > 0


def decode(policy: Path, tokens) -> str:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(policy).decode(tokens.tolist())


@pytest.mark.parametrize(
    "world", [{"model": {"max_context": 512}, "rollout": {"max_tokens": 500}}], indirect=True
)
def test_killed_or_stopped_it_leaves_no_process(world, policy, tmp_path):
    broker, actor = world
    broker.publish_reply = lambda message: None  # nothing is ever acknowledged: work is always in hand
    ask(broker)
    until(lambda: broker.received["publish"], actor)
    family = actor.family()
    assert len(family) >= 2

    actor.process.send_signal(signal.SIGKILL)
    actor.wait()
    until(lambda: not alive(family))


@pytest.mark.parametrize(
    "world", [{"model": {"max_context": 512}, "rollout": {"max_tokens": 500}}], indirect=True
)
def test_second_signal_ends_a_drain_and_reaches_the_engine(world):
    broker, actor = world
    broker.publish_reply = lambda message: None
    ask(broker)
    until(lambda: broker.received["publish"], actor)
    family = actor.family()

    os.killpg(actor.process.pid, signal.SIGTERM)  # as a launcher does: the engine must not hear it
    until(lambda: any(beat.state == "draining" for beat in broker.received["heartbeat"]), actor)
    os.killpg(actor.process.pid, signal.SIGTERM)
    assert actor.wait() == 0
    until(lambda: not alive(family))
    assert broker.received["goodbye"][-1].reason == "leaving"


@pytest.mark.nightly
def test_a_dead_engine_hands_back_the_leases_and_asks_for_a_restart(world):
    broker, actor = world
    broker.publish_reply = lambda message: None
    ask(broker)
    until(lambda: broker.received["publish"], actor)
    family = actor.family()

    os.kill(engine_of(actor), signal.SIGKILL)
    assert actor.wait() == EXIT_RESTART
    assert broker.received["goodbye"][-1].reason == "leaving"
    until(lambda: not alive(family))
