"""Evaluation of a model at rest with the real engine: the answers depend on the plan and the question only."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from actor_world import write_policy

from actors.engine import Engine
from actors.offline_eval import EvalPlan, answer_all, plan_questions, unanswered
from common.evaluation import AnswerFile, summarise

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    return write_policy(tmp_path_factory.mktemp("policy"), seed=11)


@pytest.fixture(scope="module")
def questions_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("questions") / "sums.jsonl"
    rows = [{"problem": f"{i}+{i}=", "answer": str(2 * i)} for i in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_sampled_and_greedy_answers_do_not_depend_on_what_runs_beside_them(policy, questions_file, tmp_path):
    plan = EvalPlan(
        model=str(policy),
        fingerprint="",
        sets=(questions_file,),
        template="no",
        samples=4,
        temperature=0.8,
        max_tokens=32,
        max_context=64,
        level="fast",
        dtype="float32",
        limit=None,
        seed=7,
        sequences=32,
        tensor_parallel=1,
        kv_cache_mb=64,
    )
    questions = plan_questions(plan, None)
    engine = Engine(**plan.engine_arguments)
    with asyncio.Runner() as runner:

        def answers(name: str, chosen) -> dict:
            file = AnswerFile(tmp_path / name, plan.settings)
            left = unanswered(chosen, file)
            runner.run(answer_all(plan, engine, left, file, lambda answer: None))
            file.close()
            return file.answers

        try:
            whole = answers("whole", questions)
            pieces = answers("pieces", questions[5:9]) | answers("pieces", questions[::-1])
            assert pieces == whole
        finally:
            engine.shutdown()
    texts = {response.text for answer in whole.values() for response in answer.responses}
    assert len(texts) > 48  # of 96 responses: samples differ
    report = summarise(whole.values())
    assert report.sets[0].questions == 24
    assert set(report.sets[0].pass_at) == {1, 2, 4}
    assert 0 < report.sets[0].tokens_mean <= 32
