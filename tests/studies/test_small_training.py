"""Small runs: staleness is what it says, the update is the learner's, full-size points become the same rows."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
import torch

from common.recipe import load_recipe
from common.tasks.countdown import reward
from common.tasks.templates import get_template
from common.tracking.spool import Spool, read_spool
from learner.objectives import preset
from learner.pretraining.tokenizer import build_tokenizer
from studies.countdown import _problems, _response, documents
from studies.curves import at_end, score, small_run, units_of
from studies.pipeline import rows_of
from studies.questions import PARTS, held_out, training_set
from studies.samplers import cut
from studies.staleness import CLOCKS, CORRECTIONS, Staleness
from studies.study import Budget, Setting, Unit
from studies.training import Problem, Run, _Loop, train

PROBLEM = Problem("1+1=?", {"answer": "2", "level": 1})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model of a few thousand parameters."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer((), ("\\boxed{",), 64)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def run(model: str, **changes) -> Run:
    settings = {"steps": 5, "questions": 2, "group": 4, "max_tokens": 6, "eval_every": 10, "lr": 1e-3}
    # Any reward with variance will do: a random model never answers.
    settings["reward"] = lambda text, row: float(len(text) % 2)
    return Run(model, [PROBLEM], [PROBLEM], **{**settings, **changes})


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_a_batch_is_trained_so_many_versions_later(model: str, staleness: int) -> None:
    rows = [row for row in train(run(model, staleness=staleness)) if row["kind"] == "train"]
    assert [row["step"] - row["version"] for row in rows] == [min(step, staleness) for step in range(5)]


def test_recorded_log_probabilities_are_those_of_the_sampler(model: str) -> None:
    """By plain transformers, one response at a time."""
    loop = _Loop(run(model, staleness=1))
    batch = loop.experience(0)
    lm = loop._policy.lm
    lm.set_attn_implementation("sdpa")
    for prompt, response, recorded in zip(batch.prompts, batch.responses, batch.logps, strict=True):
        logits = lm(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).squeeze(-1)
        torch.testing.assert_close(recorded, expected.detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("algorithm", ["dr_grpo", "grpo"])
def test_update_follows_the_gradient_of_the_formula(model: str, algorithm: str) -> None:
    """The gradient before the optimizer, against sum A w log π written out response by response."""
    loop = _Loop(run(model, algorithm=algorithm, changes={"clip_low": 0.2}))
    batch = loop.experience(0)
    batch = batch._replace(rewards=torch.tensor([[1.0, 0, 0, 0], [1.0, 1, 0, 0]]))
    name, parameter = next(iter(loop._policy.named_parameters()))
    seen: list[torch.Tensor] = []
    loop._optimizer.step = lambda: seen.append(parameter.grad.clone())
    norm = loop.update(batch, 0)["gradient"]
    centred = batch.rewards - batch.rewards.mean(1, keepdim=True)
    if algorithm == "grpo":
        centred = centred / (batch.rewards.std(1, keepdim=True) + 1e-8)
    lm = loop._policy.lm
    lm.set_attn_implementation("sdpa")
    loss = torch.zeros(())
    for prompt, response, advantage in zip(batch.prompts, batch.responses, centred.flatten(), strict=True):
        logits = lm(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logp = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).sum()
        length = len(response) if algorithm == "grpo" else 6
        loss = loss - advantage * logp / (8 * length)
    (expected,) = torch.autograd.grad(loss, [parameter])
    torch.testing.assert_close(seen[0], expected / max(1.0, norm), atol=1e-5, rtol=1e-3)
    assert name


def test_every_objective_of_the_staleness_study_trains(model: str) -> None:
    for name in CORRECTIONS:
        rows = train(run(model, algorithm=name, staleness=2, steps=3))
        assert [row["kind"] for row in rows] == ["eval", "train", "train", "train", "eval"]
        assert all(0 < row["ratio_ess"] <= 1.001 for row in rows if "ratio_ess" in row)
        assert preset(name).correction in name or preset(name).correction == "none"


def test_training_and_held_out_questions_do_not_meet() -> None:
    asked = {question.problem for question in held_out(150)}
    assert len(asked) == 150
    for name in PARTS:
        trained = {question.problem for question in training_set(name, 300)}
        assert len(trained) == 300
        assert not trained & asked


def test_stop_strings_cut_where_they_first_occur() -> None:
    r1 = get_template("r1")
    assert cut("a</answer>b</answer>", r1) == ("a</answer>", True)
    assert cut("a", r1) == ("a", False)
    assert cut("7\n\nQuestion: x", get_template("few_shot")) == ("7", True)


def test_countdown_text_answers_in_the_asked_form_and_search_pays() -> None:
    texts = [document.response for document in itertools.islice(documents(random.Random(0)), 400)]
    answered = [text for text in texts if "<answer>" in text]
    assert 0.4 < len(answered) / len(texts) < 0.9
    rng = random.Random(1)
    scored = [(_response(dict(p.row), rng), p) for p in _problems(200, 5)]
    rewards = [reward(text, problem.row) for text, problem in scored]
    assert set(rewards) == {0.0, 0.1, 1.0}


def test_points_of_a_pipeline_run_become_rows(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "metrics.jsonl")
    spool.append("learner", 0, {"reward": 0.1, "length": 9.0})
    spool.append("actor", 0, {"length": 5.0, "accuracy": 0.1})
    spool.append("learner", 1, {"reward": 0.9})
    spool.append("learner", 2, {"reward": 0.9})
    spool.append("learner", 1, {"reward": 0.2})  # after a rewind
    spool.append("eval", 0, {"greedy": 0.3, "a/greedy": 0.2, "b/greedy": 0.6})
    rows = rows_of(read_spool(tmp_path / "metrics.jsonl"))
    train_rows = [row for row in rows if row["kind"] == "train"]
    assert [(row["step"], row["reward"]) for row in train_rows] == [(0, 0.1), (1, 0.2)]
    assert [row["length"] for row in train_rows] == [5.0, None], "of all that was sampled"
    assert score(rows) == pytest.approx(0.4)  # the unweighted mean over sets


@pytest.mark.parametrize("clock", CLOCKS)
def test_the_pipeline_that_is_timed_takes_its_settings(clock: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(recipe: str, run: str, root: Path, settings: dict) -> list:
        loaded = load_recipe(recipe, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
        assert loaded.batch.max_staleness == CLOCKS[clock]
        return [{"kind": "train", "step": 0}, {"kind": "clock", "step": loaded.run.steps, "seconds": 1.0}]

    monkeypatch.setattr("studies.staleness.run_recipe", resolve)
    unit = Unit("clock", {"clock": clock, "seed": 2}, alone=True)
    (row,) = Staleness().run(unit, Setting(Budget.MINIATURE, (2,), Path("out"), Path("zoo")))
    assert (row["clock"], row["seed"], row["seconds"]) == (clock, 2, 1.0)
    assert row["step"] > 0


def test_units_are_named_by_what_tells_runs_apart(tmp_path: Path) -> None:
    runs = ({"a": name, "b": 2} for name in "xy")  # read once, and needed for each seed
    units = units_of(Setting(Budget.MINIATURE, (0, 3), tmp_path, tmp_path), runs)
    assert [unit.key for unit in units] == ["x/2/seed-0", "y/2/seed-0", "x/2/seed-3", "y/2/seed-3"]
    assert units[-1].arguments == {"a": "y", "b": 2, "seed": 3}


def test_the_tests_budget_overrides_every_size(tmp_path: Path) -> None:
    sizes = {"seed": 1, "problems": 50, "tested": 20, "steps": 9, "questions": 9, "max_tokens": 99, "lr": 0.5}
    large, small = (
        small_run(Setting(budget, (1,), tmp_path, tmp_path), "llama", **sizes)
        for budget in (Budget.MINIATURE, Budget.SECONDS)
    )
    assert (len(large.problems), len(large.held_out), large.steps, large.questions) == (50, 20, 9, 9)
    assert (len(small.problems), len(small.held_out), small.steps, small.questions) == (16, 4, 4, 4)
    assert large.max_tokens == 99 > small.max_tokens
    assert large.lr == small.lr == 0.5
    assert large.model.endswith("llama-seed-0")  # seeds are of training; the base is one


def test_ends_of_a_curve() -> None:
    rows = [{"kind": "train", "step": step, "reward": float(step), "a": 1} for step in range(11)]
    assert at_end(rows, "reward", a=1) == 9.0
    with pytest.raises(ValueError, match="nothing"):
        at_end(rows, "reward", a=2)
