"""Studies repeat what is independent, and in full size follow the paper's protocol."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.recipe import load_recipe
from common.tasks.templates import get_template
from studies import leaderboard, probing, samplers, staleness
from studies.countdown import Countdown, _mini_run
from studies.curves import of_base
from studies.duet import Duet
from studies.exploration import Exploration
from studies.leaderboard import Leaderboard
from studies.reflection import SelfReflection
from studies.samplers import EndpointSampler, EngineSampler, Response, request_seed
from studies.study import Budget, Setting
from studies.training import Problem

FULL = Setting(Budget.FULL, (0, 1, 2), Path(), Path())


def test_a_start_that_all_seeds_share_counts_once() -> None:
    rows = [{"seed": seed, "score": 0.4} for seed in range(3)]
    assert of_base(lambda some: some[0]["score"])(rows) == [0.4]
    start = [
        {"seed": seed, "kind": "eval", "step": 0, "template": template, "set": name, "score": score}
        for seed in range(3)
        for template, score in (("no", 0.7), ("qwen_math", 0.5), ("r1", 0.1))
        for name in ("orz", "math", "gsm8k", "asdiv")
    ]
    findings = Duet().judge(start).findings[:2]
    assert [finding.repetitions for finding in findings] == [1, 1]
    assert {finding.outcome for finding in findings} == {"unclear"}


def test_a_model_of_the_hub_is_analysed_once() -> None:
    assert [unit.key for unit in Exploration().units(FULL)] == ["qwen-math/seed-0", "llama/seed-0"]


def test_nothing_is_claimed_of_a_hub_model_s_pretraining_text() -> None:
    claims = [finding.expectation.claim for finding in SelfReflection().judge([], full=True).findings]
    assert len(claims) == len(SelfReflection.expectations) - 2
    assert not any("own text" in claim or "control" in claim for claim in claims)


def test_repetitions_share_no_sample() -> None:
    """An engine gives sample i of a request the seed of the request + i."""
    seeds = [request_seed(seed, number) + i for seed in range(3) for number in range(50) for i in range(16)]
    assert len(set(seeds)) == len(seeds)


def test_engine_and_endpoint_ask_with_these_seeds() -> None:
    asked = []

    async def generate(prompt, samples, sampling) -> list:
        asked.append(sampling.seed)
        return []

    engine = object.__new__(EngineSampler)
    engine._engine = SimpleNamespace(tokenizer=SimpleNamespace(encode=list), generate=generate)
    engine._loop = asyncio.new_event_loop()
    how = {"samples": 2, "temperature": 1.0, "max_tokens": 4, "seed": 5}
    engine.sample(["a", "b"], get_template("no"), **how)
    engine._loop.close()
    wanted = [request_seed(5, 0), request_seed(5, 1)]
    assert asked == wanted
    asked.clear()
    client = SimpleNamespace(complete=lambda prompt, n, **body: asked.append(body["seed"]) or [])
    EndpointSampler(client).sample(["a", "b"], get_template("no"), **how)
    assert sorted(asked) == sorted(wanted)


def test_probe_questions_have_all_levels_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"problem": f"q{i}", "answer": "1", "level": 1 + (i > 9) * (i % 5)} for i in range(60)]
    (tmp_path / "math_12k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("SLIPSTREAM_DATA", str(tmp_path))
    levels = [problem.row["level"] for problem in probing.probe_problems(FULL, 20)]
    assert levels == [1, 2, 3, 4, 5] * 4


def test_full_size_grades_as_the_paper_s_evaluation() -> None:
    """Level `full`, and a response that was cut counts if its answer is right."""
    pairs = [
        (Response("\\boxed{1,2}", 9, True), Problem("", {"answer": "(1,2)"})),
        (Response("\\boxed{7}, and", 9, False), Problem("", {"answer": "7"})),
    ]
    template = get_template("no")
    assert probing.verdicts(pairs, template, full=True) == ["correct", "correct"]
    assert probing.verdicts(pairs, template, full=False) == ["wrong", "truncated"]
    assert probing.accuracy(pairs, template, full=True, level="fast") == 0.5


def test_countdown_is_a_run_of_grpo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the linked analysis; paper-*'s preset is Dr. GRPO."""
    assert load_recipe("countdown").algorithm.preset == "grpo"
    monkeypatch.setattr("studies.countdown._base_model", lambda seed, setting: tmp_path)
    assert _mini_run(0, Setting(Budget.SECONDS, (0,), tmp_path, tmp_path)).algorithm == "grpo"
    assert "GRPO" in Countdown.miniature


def test_best_correction_is_chosen_by_other_seeds() -> None:
    """Six corrections that do nothing but noise: the best of the same seed would always gain."""
    lucky = {0: "dr_grpo_tis", 1: "dr_grpo_icepop", 2: "dr_grpo_m2po"}
    rows = [
        {
            "kind": "train",
            "seed": seed,
            "step": 0,
            "staleness": 16,
            "correction": name,
            "reward": 0.5 + 0.1 * (lucky[seed] == name),
        }
        for seed in lucky
        for name in staleness.CORRECTIONS
    ]
    assert staleness.best_correction_gains(rows) == [0.0, 0.0, 0.0]
    assert len(staleness.best_correction_gains([])) == 0


def _evaluated(seed: int, step: int, score: float) -> dict:
    return {"kind": "eval", "seed": seed, "step": step, "size": "7B", "algorithm": "dr_grpo", "score": score}


def test_leaderboard_compares_with_the_base_under_its_best_template() -> None:
    runs = [_evaluated(seed, step, score) for seed in (0, 1) for step, score in ((0, 0.26), (9, 0.5))]
    bases = [
        {"kind": leaderboard.BASE, "size": "7B", "template": name, "score": score}
        for name, score in (("no", 0.38), ("r1", 0.0))
    ]
    assert leaderboard.gains(runs) == pytest.approx([0.24, 0.24])
    assert leaderboard.gains([*bases, *runs]) == pytest.approx([0.12, 0.12])
    assert len(Leaderboard().judge(runs, full=True).findings) == 1


def test_leaderboard_runs_the_paper_s_best_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oat-Zero-1.5B and -7B were trained under the Qwen-Math template; a base is measured under each, then let go."""
    templates = {size: load_recipe(recipe).data.template for size, recipe in leaderboard.RECIPES.items()}
    assert templates == {"1.5B": "qwen_math", "3B": "r1", "7B": "qwen_math"}
    closed: list[str] = []

    class Sampler:
        def __init__(self, model: str) -> None:
            self.model = model

        def sample(self, questions, template, **_: object) -> list:
            return [[Response("\\boxed{1}", 3, True)] for _ in questions]

        def close(self) -> None:
            closed.append(self.model)

    monkeypatch.setattr(leaderboard, "EngineSampler", Sampler)
    monkeypatch.setattr(
        leaderboard, "benchmark_problems", lambda: {"amc": [Problem("q", {"answer": "1"})] * 2}
    )
    rows = leaderboard._base_rows("7B")
    assert {row["template"]: row["score"] for row in rows} == {"no": 1.0, "r1": 0.0, "qwen_math": 1.0}
    assert closed == ["Qwen/Qwen2.5-Math-7B"]
    assert samplers.EngineSampler is not Sampler
