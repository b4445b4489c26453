"""The actor's small parts: prompts, policy, scores, meters, evaluation, heart, joining and leaving."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace

import msgspec
import pytest
from actor_fakes import FakeEngine, FakeGrader, FakeWeights, a_sample, prompts

from actors import main as actor_main
from actors import rollout as rollout_module
from actors.actor import Actor
from actors.engine import Engine
from actors.evaluation import TEXTS_PER_SET, Evaluator
from actors.heart import Heart
from actors.leaving import Leaving
from actors.meters import Meters
from actors.policy import Policy
from actors.scoring import Score, Scorer
from common import systemd
from common.errors import EXIT_RESTART, RunFailedError
from common.messages import (
    Ack,
    EvalJob,
    EvalQuestion,
    EvalResult,
    Goodbye,
    Heartbeat,
    Hello,
    Pulse,
    Refused,
    WeightsAddress,
)
from common.model_files import tokenizer_digest
from common.wire import BrokerUnreachable, Client, RefusedError, Reply
from tests.scripted.broker import running_broker, scripted_recipe


class TestPrompts:
    def test_one_beginning_of_sequence_token(self):
        assert prompts().encode("ab") == [1, 97, 98]

    def test_not_two_when_the_template_writes_one(self):
        assert prompts().encode("<s>ab") == [1, 97, 98]

    def test_digest_tells_vocabularies_apart(self):
        class Tokenizer:
            def __init__(self, vocabulary):
                self.get_vocab = lambda: vocabulary

        one = tokenizer_digest(Tokenizer({"a": 0, "b": 1}))
        assert one == tokenizer_digest(Tokenizer({"b": 1, "a": 0}))
        assert one != tokenizer_digest(Tokenizer({"a": 1, "b": 0}))


class TestPolicy:
    def test_changes_at_a_commit_and_not_at_an_announcement(self):
        policy = Policy()
        policy.announce(WeightsAddress(address="gloo://h:1/t1", token="t1", era=1))
        policy.committed(4, "t1")
        policy.announce(WeightsAddress(address="gloo://h:1/t2", token="t2", era=2))
        assert (policy.version, policy.era) == (4, 1)
        policy.committed(5, "t1")  # the push of the old publisher was still under way
        assert (policy.version, policy.era) == (5, 1)
        policy.committed(4, "t2")
        assert (policy.version, policy.era) == (4, 2)

    def test_the_base_model_is_version_0_of_every_era(self):
        policy = Policy()
        policy.announce(WeightsAddress(address="gloo://h:1/t1", token="t1", era=1))
        assert (policy.version, policy.era) == (0, 1)

    def test_forgets_old_publishers(self):
        policy = Policy()
        for era in range(1000):
            policy.announce(WeightsAddress(address=f"gloo://h:1/{era}", token=str(era), era=era))
        assert len(policy._eras) < 20


class TestScores:
    def test_a_truncated_response_earns_nothing_unseen(self):
        grader = FakeGrader()
        scorer = Scorer(grader)
        samples = [a_sample(text="right", finish="length"), a_sample(text="right"), a_sample(text="no")]
        scores = asyncio.run(scorer.score({"answer": "2"}, samples))
        assert scores == [Score("truncated", 0.0), Score("correct", 1.0), Score("wrong", 0.0)]
        assert (grader.asked, scorer.waiting) == (2, 0)

    def test_an_evaluation_reads_what_stands_before_the_cut(self):
        samples = [a_sample(text=text, finish="length") for text in ("right", "no")]
        scores = asyncio.run(Scorer(FakeGrader()).evaluate({"answer": "2"}, samples))
        assert scores == [Score("correct", 1.0), Score("truncated", 0.0)]

    def test_meters_count_verdicts_and_rates(self):
        meters = Meters()
        meters.generated([a_sample(3), a_sample(5)], 0.5)
        meters.scored([Score("correct", 1.0), Score("truncated", 0.0)], 0.1)
        first = meters.report()
        assert first["generated_tokens"] == 8
        assert first["verdict_correct"] == first["verdict_truncated"] == 1
        assert first["tokens_per_s"] > 0
        second = meters.report()
        assert second["tokens_per_s"] == 0
        assert second["generated_tokens"] == 8


class TestEvaluation:
    def job(self, questions: int, samples: int = 2) -> EvalJob:
        rows = [
            EvalQuestion(set="s", uid=str(i), question={"problem": "1+1=", "answer": "2"})
            for i in range(questions)
        ]
        return EvalJob(job=9, requested=3, questions=rows, samples=samples, temperature=0.5, max_tokens=8)

    def evaluator(self, weights: FakeWeights) -> Evaluator:
        policy = Policy()
        policy.era = 2
        return Evaluator(FakeEngine(), prompts(), Scorer(FakeGrader()), policy, weights)

    def test_answers_every_question_in_order_at_the_pinned_version(self):
        weights = FakeWeights(version=6)
        evaluator = self.evaluator(weights)
        result = asyncio.run(evaluator.answer(self.job(10)))
        assert (result.job, result.version, result.era) == (9, 6, 2)
        assert [row.uid for row in result.rows] == [str(i) for i in range(10)]
        assert [len(row.sampled) for row in result.rows] == [2] * 10
        assert evaluator.answered == 10
        assert sum(row.greedy.text is not None for row in result.rows) == TEXTS_PER_SET
        assert weights.pins == 0

    def test_what_is_kept_of_the_texts_does_not_grow_with_the_answers(self, monkeypatch):
        """All answers travel in one message: 32 samples of 32k tokens would never arrive."""
        monkeypatch.setattr("actors.evaluation.TEXT_CHARS", 2)
        first = asyncio.run(self.evaluator(FakeWeights()).answer(self.job(1, samples=3))).rows[0]
        assert len(first.greedy.text) == 2
        assert [answer.text and len(answer.text) for answer in first.sampled] == [2, None, None]

    def test_weights_are_pinned_for_generation_only(self):
        weights = FakeWeights()
        pins: list[int] = []

        class Grader(FakeGrader):
            async def grade(self, response, question):
                pins.append(weights.pins)
                return await super().grade(response, question)

        evaluator = Evaluator(FakeEngine(), prompts(), Scorer(Grader()), Policy(), weights)
        asyncio.run(evaluator.answer(self.job(2)))
        assert set(pins) == {0}

    def test_greedy_only_and_too_long(self):
        job = self.job(1, samples=0)
        long = EvalQuestion(set="s", uid="long", question={"problem": "9" * 200, "answer": "2"})
        job = msgspec.structs.replace(job, questions=[*job.questions, long])
        rows = asyncio.run(self.evaluator(FakeWeights()).answer(job)).rows
        assert rows[0].sampled == []
        assert (rows[1].greedy.verdict, rows[1].greedy.tokens) == ("truncated", 0)


class TestHeart:
    def beat(self, replies):
        pulses: list[Pulse] = []

        class Wire:
            async def request(self, message, *, timeout_s):
                reply = next(replies)
                if isinstance(reply, Exception):
                    raise reply
                return Reply(reply, [])

        async def on_pulse(pulse):
            pulses.append(pulse)

        heart = Heart(Wire(), 0.0, lambda: Heartbeat(state="generating"), on_pulse, int)
        with pytest.raises(RefusedError):
            asyncio.run(heart.beat())
        return pulses

    def test_survives_an_outage_and_ends_when_shut_out(self, caplog):
        pulse = Pulse(step=1, version=1, era=0, weights=None, command="run")
        shut_out = RefusedError(Refused(code="shut_out", reason="bad messages"))
        with caplog.at_level(logging.WARNING):
            pulses = self.beat(iter([pulse, BrokerUnreachable("no answer"), pulse, shut_out]))
        assert len(pulses) == 2
        assert "work in hand is kept" in caplog.text

    def test_beats_at_once_when_something_has_changed(self):
        beats: list[Heartbeat] = []

        class Wire:
            async def request(self, message, **_):
                beats.append(message)
                return Reply(Pulse(step=1, version=1, era=0, weights=None, command="run"), [])

        async def on_pulse(_):
            pass

        async def twice():
            beat = lambda: Heartbeat(state="generating", version=len(beats))  # noqa: E731
            heart = Heart(Wire(), 1e6, beat, on_pulse, int)
            task = asyncio.create_task(heart.beat())
            while len(beats) < 3:
                await asyncio.sleep(0)
                heart.soon()
            task.cancel()

        asyncio.run(asyncio.wait_for(twice(), 30))
        assert [beat.version for beat in beats][:3] == [0, 1, 2]

    @pytest.mark.parametrize("samples", [True, False])
    def test_a_slow_group_is_progress_and_an_engine_that_samples_nothing_is_not(self, samples, monkeypatch):
        """Under systemd: responses of half an hour are no reason to kill who samples them."""
        clock = [0.0]
        monkeypatch.setattr(systemd, "time", SimpleNamespace(monotonic=lambda: clock[0]))
        shut_out = RefusedError(Refused(code="shut_out", reason="over"))
        running: dict[str, SimpleNamespace] = {}
        engine = Engine.__new__(Engine)
        engine.llm = SimpleNamespace(output_processor=SimpleNamespace(request_states=running))

        class Wire:
            async def request(self, message, **_):
                clock[0] += 100.0
                if samples:
                    tokens = int(clock[0])
                    running["r0"] = SimpleNamespace(
                        detokenizer=SimpleNamespace(num_output_tokens=lambda: tokens)
                    )
                if clock[0] > 3000.0:
                    raise shut_out
                return Reply(Pulse(step=1, version=1, era=0, weights=None, command="run"), [])

        async def on_pulse(_):
            pass

        telemetry = {"generated_tokens": 0.0}
        beat = Heartbeat(state="generating", telemetry=telemetry)
        heart = Heart(Wire(), 0.0, lambda: beat, on_pulse, lambda: engine.running_tokens)
        with pytest.raises(RefusedError):
            asyncio.run(heart.beat())
        assert heart._progress() is samples


class TestLeaving:
    def leave(self, script):
        """Runs `script(leaving)` while an endless drain is under way; the way taken and the drains begun."""
        drains = []

        async def scenario():
            leaving = Leaving()

            async def drain(order):
                drains.append(order)
                await asyncio.sleep(0 if order.deadline_s == 1.0 else 60)

            ordered = asyncio.create_task(leaving.ordered(drain))
            await asyncio.sleep(0)
            for step in script:
                step(leaving)
                await asyncio.sleep(0)
            return await ordered

        return asyncio.run(scenario()), drains

    def test_one_drain_is_carried_out(self):
        way, drains = self.leave([lambda x: x.drain(1.0, "scale in")])
        assert way == "drain"
        assert [order.reason for order in drains] == ["scale in"]

    def test_a_stop_overtakes_a_drain(self):
        way, drains = self.leave([lambda x: x.drain(9.0, "SIGTERM"), lambda x: x.stop("the run ends")])
        assert (way, len(drains)) == ("stop", 1)

    def test_a_second_signal_stops(self):
        way, drains = self.leave([lambda x: x._on_signal("SIGTERM"), lambda x: x._on_signal("SIGINT")])
        assert (way, len(drains)) == ("stop", 1)

    def test_a_second_drain_changes_nothing(self):
        way, drains = self.leave([lambda x: x.drain(1.0, "a"), lambda x: x.drain(9.0, "b")])
        assert way == "drain"
        assert [order.reason for order in drains] == ["a"]


class TestJoining:
    def test_an_engine_that_does_not_start_again_is_tried_again(self, tmp_path, monkeypatch):
        """Its GPU may not be free yet; a setting that is wrong would not have let it start the first time."""

        def no_memory(**_):
            raise RunFailedError("vLLM could not start: Free memory on device is less than desired")

        monkeypatch.setattr(actor_main, "Engine", no_memory)
        for name in ("require_gpu_build", "require_tokenizer", "_use_threads"):
            monkeypatch.setattr(actor_main, name, lambda _: None)
        with running_broker(scripted_recipe(tmp_path)) as address:
            known = Client(address, Hello(role="actor", peer="a", software="0.1.0", host="h", pid=1))
            known.connect(10.0)
            known.request(Goodbye(reason="died"), timeout_s=10.0)
            known.close()
            assert actor_main.run_actor(address, name="a") == EXIT_RESTART
            with pytest.raises(RunFailedError, match="Free memory on device"):
                actor_main.run_actor(address, name="b")

    def test_refused_by_the_broker(self, monkeypatch):
        def refuse(self, timeout_s):
            raise RefusedError(Refused(code="incompatible", reason="another version"))

        monkeypatch.setattr(actor_main.Client, "connect", refuse)
        with pytest.raises(RunFailedError, match="another version"):
            actor_main.run_actor("127.0.0.1:1", name="a")


class TestAnswersToAnEvaluation:
    JOB = EvalJob(job=3, requested=0, questions=[], samples=0, temperature=1.0, max_tokens=8)

    def answer(self, monkeypatch, replies: list, evaluate=None) -> list:
        monkeypatch.setattr(rollout_module, "RETRY_S", 0.001)
        said = []

        async def result(job: EvalJob) -> EvalResult:
            if evaluate is not None:
                raise evaluate
            return EvalResult(job=job.job, version=0, era=0, rows=[], seconds=1.0)

        class Wire:
            async def request(self, message, payload=(), *, timeout_s=60.0):
                said.append(message)
                reply = replies.pop(0)
                if isinstance(reply, Refused):
                    raise RefusedError(reply)

        actor = Actor.__new__(Actor)
        actor._wire, actor._evaluator = Wire(), SimpleNamespace(answer=result)
        asyncio.run(actor._answer(self.JOB))
        return said

    def test_are_sent_again_after_a_passing_refusal(self, monkeypatch):
        full = Refused(code="full", reason="the disk is full")
        said = self.answer(monkeypatch, [full, full, Ack()])
        assert [message.kind for message in said] == ["eval_result"] * 3

    @pytest.mark.parametrize("failure", ["refused", "defect"])
    def test_that_come_to_nothing_give_the_job_back(self, monkeypatch, failure):
        refused = Refused(code="malformed", reason="a row is missing")
        defect = KeyError("a defect")
        replies, evaluate = ([refused, Ack()], None) if failure == "refused" else ([Ack()], defect)
        said = self.answer(monkeypatch, replies, evaluate)
        assert (said[-1].kind, said[-1].evaluation, said[-1].groups) == ("release", 3, [])
        assert ("a row is missing" if failure == "refused" else "a defect") in said[-1].reason
