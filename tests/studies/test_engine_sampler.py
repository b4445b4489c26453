"""A vLLM engine samples for a study as transformers does."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.tasks.templates import get_template
from studies.questions import held_out

MODEL = Path(__file__).parents[2] / "models" / "minimath-base"


@pytest.mark.nightly
@pytest.mark.e2e
def test_greedy_answers_agree_with_transformers() -> None:
    pytest.importorskip("vllm")
    from studies.samplers import EngineSampler, LocalSampler

    questions = [question.problem for question in held_out(12)]
    template = get_template("qwen_math")
    engine = EngineSampler(str(MODEL), dtype="float32", max_model_len=256)
    try:
        served = engine.sample(questions, template, samples=1, temperature=0.0, max_tokens=48)
        many = engine.sample(questions[:2], template, samples=3, temperature=1.0, max_tokens=8)
        repetitions = [
            engine.sample(questions[:1], template, samples=8, temperature=1.0, max_tokens=16, seed=seed)
            for seed in (0, 1)
        ]
    finally:
        engine.close()
    first, second = ([response.text for response in found[0]] for found in repetitions)
    assert first[1:] != second[:-1]  # vLLM numbers the samples of a request from its seed on
    local = LocalSampler(str(MODEL)).sample(questions, template, samples=1, temperature=0.0, max_tokens=48)
    same = sum(a[0].text == b[0].text for a, b in zip(served, local, strict=True))
    assert same >= 11  # a tie of two logits may go either way
    assert [len(responses) for responses in many] == [3, 3]
    assert all(0 < response.tokens <= 8 for responses in many for response in responses)
