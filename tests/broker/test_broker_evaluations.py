"""Held-out evaluations: when they are due, who gets them, what comes of them."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path

import msgspec
import pytest

from broker.evaluation import Evaluations
from broker.evaluation_metrics import metrics_of
from broker.main import open_run
from broker.service import Service
from broker.state import RunState, load_held_out, load_training_set
from common.codec import decode, encode
from common.messages import (
    EvalQuestion,
    EvalResult,
    EvalRow,
    Hello,
    Lease,
    Message,
    Release,
    Scored,
    StatusQuery,
)
from common.tracking.spool import read_spool
from tests.scripted.actor import ScriptedActor, answer_evaluation
from tests.scripted.broker import running_broker, scripted_recipe
from tests.scripted.learner import ScriptedLearner

QUESTIONS = [EvalQuestion(set="held", uid=str(i), question={"problem": "?", "answer": "1"}) for i in range(4)]


def schedule(every: int = 4) -> Evaluations:
    return Evaluations(QUESTIONS, every, samples=2, temperature=1.0, max_tokens=64, lease_max_s=100.0)


def answered(evaluations: Evaluations, job: object, version: int) -> dict | None:
    return evaluations.result(answer_evaluation(job, version, 0))


def test_due_at_the_start_every_k_versions_and_at_the_end() -> None:
    evaluations = schedule(every=4)
    asked = [version for version in range(11) if evaluations.at(version, final=version == 10)]
    assert asked == [0, 4, 8, 10]


def test_one_actor_new_enough_and_free_gets_it_whole() -> None:
    evaluations = schedule()
    evaluations.at(4, final=False)
    assert evaluations.grant("old", 3, 0.0) is None
    job = evaluations.grant("a", 5, 0.0)
    assert len(job.questions) == 4
    assert evaluations.grant("b", 9, 0.0) is None
    evaluations.at(8, final=False)
    assert evaluations.grant("a", 9, 0.0) is None, "it has one in hand"
    assert evaluations.grant("b", 9, 0.0).requested == 8


@pytest.mark.parametrize("how", ["dies", "takes too long"])
def test_a_job_that_came_to_nothing_goes_to_another(how: str) -> None:
    evaluations = schedule()
    evaluations.at(0, final=False)
    job = evaluations.grant("a", 0, 0.0)
    if how == "dies":
        evaluations.drop_actor("a")
    else:
        evaluations.tick(101.0)
    assert evaluations.grant("b", 1, 101.0) == job
    assert answered(evaluations, job, 1)["version"] == 1
    assert answered(evaluations, job, 1) is None, "twice counts once"


def test_a_job_that_is_handed_back_goes_to_another_but_not_for_ever() -> None:
    evaluations = schedule()
    evaluations.at(0, final=False)
    job = evaluations.grant("a", 0, 0.0)
    assert evaluations.hand_back("b", job.job), "not its own"
    assert "a" in [running.actor for running in evaluations.running.values()]
    for kept in (True, True, False):
        assert evaluations.hand_back("a", job.job) is kept
        assert evaluations.grant("a", 0, 0.0) == (job if kept else None)
    evaluations.at(4, final=False)
    assert evaluations.grant("a", 4, 0.0).requested == 4, "the next one is another"


def test_an_actor_that_fails_at_an_evaluation_says_so_and_it_goes_to_another(tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"problem": "1?", "answer": "1"}) + "\n")
    recipe = scripted_recipe(tmp_path, eval={"sets": [str(held)]})
    state = open_run(recipe, recipe.folder, load_training_set(recipe), load_held_out(recipe))
    service = Service(state)

    def say(sender: bytes, message: Message) -> Message:
        service.receive(sender, [memoryview(encode(message, next(numbers)))], 0.0)
        service.settle(0.0)
        return decode(service.outbox.empty()[-1].frames[0])[0]

    numbers = itertools.count()
    for name in ("a", "b"):
        say(name.encode(), Hello(role="actor", peer=name, software="0.1.0", host="h", pid=1))
    lease = Lease(capacity=1, version=0, era=0, wait_s=1.0)
    job = say(b"a", lease).evaluation
    assert say(b"b", lease).evaluation is None
    say(b"a", Release(groups=[], reason="KeyError: a defect", evaluation=job.job))
    assert say(b"b", lease).evaluation == job
    assert "failed at evaluation 1, which goes to another: KeyError" in state.events[-1]["text"]


def test_a_part_of_an_evaluation_is_none() -> None:
    evaluations = schedule()
    evaluations.at(4, final=False)
    job = evaluations.grant("a", 4, 0.0)
    whole = answer_evaluation(job, 4, 0)
    for rows in (whole.rows[1:], [*whole.rows, whole.rows[0]], []):
        with pytest.raises(ValueError, match="do not answer the 4 questions once each"):
            evaluations.result(msgspec.structs.replace(whole, rows=rows))
    with pytest.raises(ValueError, match="version 3 answers an evaluation of version 4"):
        evaluations.result(msgspec.structs.replace(whole, version=3))
    assert evaluations.result(whole) is not None


def test_a_newer_one_replaces_one_that_nobody_took() -> None:
    evaluations = schedule()
    evaluations.at(0, final=False)
    evaluations.at(4, final=False)
    assert evaluations.grant("a", 4, 0.0).requested == 4
    assert evaluations.waiting is None


def test_a_rewind_forgets_what_was_measured_of_lost_versions() -> None:
    evaluations = schedule()
    for version in (0, 4, 8):
        evaluations.at(version, final=False)
        answered(evaluations, evaluations.grant("a", version, 0.0), version)
    evaluations.rewind(5)
    assert [entry["version"] for entry in evaluations.history] == [0, 4]
    assert evaluations.at(8, final=False), "asked for again"


def test_a_restart_of_the_broker_takes_the_answer_of_the_actor_that_has_the_job() -> None:
    evaluations = schedule()
    evaluations.at(0, final=False)
    job = evaluations.grant("a", 0, 0.0)
    restored = schedule()
    restored.restore(json.loads(json.dumps(evaluations.state())), evaluations.results)
    assert answered(restored, job, 0) is not None
    assert restored.waiting is None


def test_a_restart_loses_no_result_to_an_older_job_that_is_still_open() -> None:
    evaluations = schedule(every=4)
    evaluations.at(4, final=False)
    slow = evaluations.grant("slow", 4, 0.0)
    evaluations.at(8, final=True)
    final = evaluations.grant("fast", 8, 1.0)
    answered(evaluations, final, 8)
    restored = schedule()
    restored.restore(json.loads(json.dumps(evaluations.state())), evaluations.results)
    assert restored.settled
    assert (restored.waiting.job, restored.waiting.requested) == (slow.job, 4)
    answered(restored, slow, 4)
    assert [entry["version"] for entry in restored.history] == [8, 4]
    restored.at(12, final=True)
    assert restored.waiting.job not in (slow.job, final.job)


def test_results_are_saved_once_and_outlive_a_restart(tmp_path: Path) -> None:
    """A save at each commit must not write the history of the whole run again."""
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"problem": "1?", "answer": "1"}) + "\n")
    recipe = scripted_recipe(
        tmp_path, eval={"sets": [str(held)], "every": 1}, broker={"durability": "journal"}
    )

    def open_state() -> RunState:
        return open_run(recipe, recipe.folder, load_training_set(recipe), load_held_out(recipe))

    state = open_state()
    for version in range(3):
        state.evaluations.at(version, final=False)
        answered(state.evaluations, state.evaluations.grant("a", version, 0.0), version)
        state.changed = True
        state.save()
    assert state.evaluations.unsaved == {}
    state.evaluations.rewind(1)
    state.changed = True
    state.save()
    state.store.close()
    again = open_state()
    assert again.evaluations.history == state.evaluations.history
    assert [entry["version"] for entry in again.evaluations.history] == [0, 1]
    again.store.close()


def test_a_status_of_a_very_long_run_fits_a_message(tmp_path: Path) -> None:
    recipe = scripted_recipe(tmp_path)
    service = Service(open_run(recipe, recipe.folder, load_training_set(recipe), []))
    metrics = {f"a-set-with-a-name/{name}": 0.5 for name in range(60)}
    service.state.evaluations.results = {
        n: {"version": n, "requested": n, "pass1": n / 20_000, **metrics} for n in range(20_000)
    }
    hello = Hello(role="observer", peer="eye", software="0.1.0", host="h", pid=1)
    for number, message in enumerate((hello, StatusQuery())):
        service.receive(b"eye", [memoryview(encode(message, number))], 0.0)
    reply, _ = decode(service.outbox.empty()[-1].frames[0])
    assert [entry["version"] for entry in reply.status["evaluations"]] == [0, *range(19_901, 20_000)]
    assert len(reply.status["accuracy"]) == 20_000, "what the best checkpoint is chosen by"


def test_the_metrics_have_their_denominators() -> None:
    def scored(verdict: str, tokens: int) -> Scored:
        return Scored(verdict=verdict, reward=float(verdict == "correct"), tokens=tokens)

    rows = [
        EvalRow(
            set="a", uid="1", greedy=scored("correct", 4), sampled=[scored("correct", 2), scored("wrong", 6)]
        ),
        EvalRow(set="b/c", uid="1", greedy=scored("wrong", 8), sampled=[scored("truncated", 10)]),
    ]
    metrics = metrics_of(rows)
    assert metrics["pass1"] == 0.25, "each set counts once: (1/2 + 0) / 2, not 1/3"
    assert metrics["greedy"] == 0.5
    assert metrics["truncated"] == pytest.approx(1 / 3)
    assert metrics["length"] == 6
    assert metrics["length_correct"] == 2
    assert metrics["length_incorrect"] == 8
    assert metrics["a/pass1"] == 0.5
    assert metrics["c/pass1"] == 0.0, "a set is called by the last part of its name"
    both = metrics_of(
        [msgspec.structs.replace(row, set=name) for row, name in zip(rows, ("x/c", "b/c"), strict=True)]
    )
    assert {"x_c/pass1", "b_c/pass1"} <= set(both), "two of the same name keep their whole names"


def test_a_whole_run_evaluates_first_between_and_last(tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps({"problem": f"{i}?", "answer": "1"}) + "\n" for i in range(3)))
    recipe = scripted_recipe(tmp_path, run={"steps": 6}, eval={"sets": [str(held)], "every": 4, "samples": 2})
    with running_broker(recipe) as address:
        workers = [ScriptedActor(address, "actor"), ScriptedLearner(address, tmp_path / "c.json")]
        threads = [threading.Thread(target=worker.run, daemon=True) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30.0)
            assert not thread.is_alive()
    records = [r for r in read_spool(recipe.folder / "metrics.jsonl") if r.kind == "eval"]
    assert [r.values["requested"] for r in records] == [0, 4, 6]
    assert all(r.values["questions"] == 3 for r in records)


def test_without_an_actor_the_run_ends_with_a_warning(tmp_path: Path) -> None:
    """The last evaluation can be answered by nobody: the run waits its time, says so and ends."""
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"problem": "1?", "answer": "1"}) + "\n")
    recipe = scripted_recipe(
        tmp_path, run={"steps": 2}, eval={"sets": [str(held)]}, broker={"final_eval_s": 0.5}
    )

    class NoEvaluations(ScriptedActor):
        def _request(self, message: object, payload: list[bytes] | tuple[()] = ()) -> None:
            if not isinstance(message, EvalResult):
                super()._request(message, payload)

    with running_broker(recipe) as address:
        workers = [NoEvaluations(address, "actor"), ScriptedLearner(address, tmp_path / "c.json")]
        threads = [threading.Thread(target=worker.run, daemon=True) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30.0)
    records = list(read_spool(recipe.folder / "metrics.jsonl"))
    assert records[-1].values["status"] == "finished"
    assert any("broker.final_eval_s" in r.values.get("text", "") for r in records if r.kind == "event")
