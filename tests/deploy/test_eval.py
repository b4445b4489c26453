"""`slipstream eval` without an engine: what is refused before one starts, what is answered again, what is written."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer import Typer
from typer.testing import CliRunner

from actors import offline_eval
from actors.engine import EngineLostError, Sample
from actors.offline_eval import EvalPlan, answer_all, plan_questions, unanswered
from common.errors import RunFailedError, UserError
from common.evaluation import AnswerFile
from deploy import eval as eval_module
from deploy import eval_screen
from deploy.folder import newest_model


class FakeTokenizer:
    bos_token = None

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(c) for c in text]}


class ChatTokenizer:
    chat_template = "there is one"

    def apply_chat_template(self, message, **_):
        return message[0]["content"]


class FakeEngine:
    """Boxes the length of the prompt; with a seed, one more for odd seeds."""

    tokenizer = FakeTokenizer()
    max_context = 50
    kv_cache_tokens = 200
    started = 0
    arguments: dict

    def __init__(self, **arguments):
        type(self).started += 1
        type(self).arguments = arguments
        self.asked: Counter[str] = Counter()
        self.running = self.most = 0

    async def warm_up(self):
        pass

    async def generate(self, prompt, samples, sampling):
        text = "".join(map(chr, prompt))
        self.asked[text] += 1
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        number = len(prompt) + (sampling.seed or 0) % 2
        tokens = np.zeros(len(prompt), dtype=np.int32)
        sample = Sample(tokens, tokens.astype(np.float32), [(0, len(tokens))], "stop", f"\\boxed{{{number}}}")
        return [sample] * samples

    def shutdown(self):
        pass


@pytest.fixture
def questions_file(tmp_path) -> Path:
    rows = [{"problem": "x" * length, "answer": str(length)} for length in range(1, 9)]
    rows.append({"problem": "y" * 60, "answer": "60"})  # does not fit the context
    path = tmp_path / "lengths.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def a_plan(sets: tuple[str, ...], **changes) -> EvalPlan:
    plan = EvalPlan(
        model="model",
        fingerprint="f",
        sets=sets,
        template="no",
        samples=0,
        temperature=1.0,
        max_tokens=20,
        max_context=50,
        level="fast",
        dtype="float32",
        limit=None,
        seed=0,
        sequences=64,
        tensor_parallel=1,
        kv_cache_mb=None,
    )
    return replace(plan, **changes)


def answers_of(plan: EvalPlan, folder: Path, engine: FakeEngine | None = None) -> AnswerFile:
    file = AnswerFile(folder, plan.settings)
    left = unanswered(plan_questions(plan, None), file)
    asyncio.run(answer_all(plan, engine or FakeEngine(), left, file, lambda answer: None))
    file.close()
    return file


class TestAnswering:
    def test_greedy_answers_each_question_once(self, questions_file, tmp_path):
        engine = FakeEngine()
        file = answers_of(a_plan((str(questions_file),)), tmp_path / "out", engine)
        verdicts = [answer.responses[0].verdict for answer in file.answers.values()]
        assert Counter(verdicts) == {"correct": 8, "unformatted": 1}
        assert set(engine.asked.values()) == {1}

    def test_goes_on_where_it_was_interrupted(self, questions_file, tmp_path):
        plan = a_plan((str(questions_file),))
        whole = answers_of(plan, tmp_path / "out").answers
        path = tmp_path / "out" / "responses.jsonl"
        kept = path.read_text().splitlines(keepends=True)[:4]
        path.write_text("".join(kept) + '{"half')
        engine = FakeEngine()
        assert answers_of(plan, tmp_path / "out", engine).answers == whole
        done = {json.loads(line)["problem"] for line in kept}
        fits = {answer.problem for answer in whole.values() if len(answer.problem) < 50}
        assert set(engine.asked) == fits - done

    def test_a_question_whose_gold_answer_changed_is_answered_again(self, questions_file, tmp_path):
        plan = a_plan((str(questions_file),))
        answers_of(plan, tmp_path / "out")
        questions_file.write_text(questions_file.read_text().replace('"answer": "3"', '"answer": "4"'))
        engine = FakeEngine()
        answers_of(plan, tmp_path / "out", engine)
        assert dict(engine.asked) == {"xxx": 1}

    def test_samples_have_seeds_of_their_own_and_depend_on_nothing_else(self, questions_file, tmp_path):
        plan = a_plan((str(questions_file),), samples=16)
        first = answers_of(plan, tmp_path / "a").answers
        half = a_plan((str(questions_file),), samples=16, limit=3)
        again = answers_of(half, tmp_path / "b").answers
        assert again.items() <= first.items()
        texts = {response.text for answer in first.values() for response in answer.responses if response.text}
        assert len(texts) == 9
        other = answers_of(replace(plan, seed=1), tmp_path / "c").answers
        assert other != first

    def test_sampled_sequences_never_exceed_the_kv_cache(self, questions_file, tmp_path):
        engine = FakeEngine()
        answers_of(a_plan((str(questions_file),), samples=16), tmp_path / "out", engine)
        assert engine.most == 200 // 50

    def test_settings_name_the_folder(self):
        plan = a_plan(("s",))
        same = replace(plan, sets=("t",), limit=3, sequences=1, kv_cache_mb=5, tensor_parallel=2)
        assert plan.digest == same.digest
        for change in (
            {"template": "r1"},
            {"seed": 1},
            {"samples": 1},
            {"fingerprint": "g"},
            {"level": "full"},
        ):
            assert replace(plan, **change).digest != plan.digest


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs `slipstream eval` with a fake engine, in an empty folder; a mistake is raised, not printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(eval_screen, "Engine", FakeEngine)
    monkeypatch.setattr(FakeEngine, "started", 0)
    model = tmp_path / "models" / "m"
    model.mkdir(parents=True)
    shape = {
        "num_hidden_layers": 1,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 128,
        "max_position_embeddings": 50,
        "model_type": "qwen2",
        "tie_word_embeddings": True,
    }
    (model / "config.json").write_text(json.dumps(shape))
    (model / "tokenizer.json").write_text("{}")
    app = Typer()
    app.command()(eval_module.evaluate)

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "120"})
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.output

    return run


class TestCommand:
    def test_prints_and_saves_the_table_and_resumes(self, command, questions_file):
        arguments = [
            "models/m",
            "-b",
            questions_file,
            "--max-tokens",
            "20",
            "--template",
            "no",
            "--no-mlflow",
        ]
        output = command(*arguments)
        assert "lengths" in output
        assert "88.9" in output
        (folder,) = Path("runs/eval").iterdir()
        assert folder.name.startswith("models-m-")
        saved = json.loads((folder / "table.json").read_text())
        assert saved["average"]["mean"] == pytest.approx(8 / 9)
        assert "| lengths | 9 | 88.9 |" in (folder / "table.md").read_text()
        assert command(*arguments).count("88.9") == output.count("88.9")
        assert FakeEngine.started == 1  # everything was answered already

    def test_mlflow_gets_settings_and_metrics(self, command, questions_file):
        command("models/m", "-b", questions_file, "--max-tokens", "20", "--template", "no")
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{Path('runs/mlflow.db').resolve()}")
        experiment = client.get_experiment_by_name("slipstream-eval")
        (run,) = client.search_runs([experiment.experiment_id])
        assert run.data.metrics["eval/average"] == pytest.approx(8 / 9)
        assert run.data.params["template"] == "no"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "give either a MODEL or --run RUN"),
            (["models/m", "--run", "r"], "give either a MODEL or --run RUN"),
            (["models/none"], "model.path: .*models/none"),
            (["models/m", "-b", "aime25000", "--max-tokens", "9"], r"^--benchmark: .*aime25000"),
            (["models/m", "--template", "r2"], "unknown template 'r2'; valid ones: "),
            (["models/m", "--max-tokens", "50"], "^--max-tokens: 50 tokens leave no room"),
            (["models/m", "--max-context", "51", "--max-tokens", "9"], "^--max-context: 51 tokens are more"),
            (["models/m", "--level", "strict", "--max-tokens", "9", "-b", "gsm-mini"], "strict"),
            (["--run", "nowhere"], "neither a run folder nor a run"),
        ],
    )
    def test_refuses_before_an_engine_starts(self, command, arguments, message):
        with pytest.raises(UserError, match=message):
            command(*arguments)
        assert FakeEngine.started == 0

    def test_a_run_brings_its_own_settings(self, command, questions_file):
        run = Path("runs/r")
        export = run / "checkpoints" / "step-000005" / "hf"
        export.parent.mkdir(parents=True)
        Path("models/m").rename(export)
        (run / "recipe.toml").write_text(
            f'[model]\npath = "m"\ntrust_remote_code = true\ndtype = "float32"\nmax_context = 40\n[data]\ntrain = "demo-train"\ntemplate = "no"\n'
            f'[rollout]\nmax_tokens = 30\n[eval]\nsets = ["{questions_file}"]\n'
        )
        assert "88.9" in command("--run", "r", "--no-mlflow")
        assert FakeEngine.arguments["trust_remote_code"] is True
        (folder,) = Path("runs/eval").iterdir()
        kept = json.loads((folder / "settings.json").read_text())
        assert {name: kept[name] for name in ("dtype", "max_tokens", "max_context", "template")} == {
            "dtype": "float32",
            "max_tokens": 30,
            "max_context": 40,
            "template": "no",
        }
        command("--run", "r", "--no-mlflow", "--dtype", "bfloat16", "--max-tokens", "20")
        assert FakeEngine.started == 2

    def test_code_of_the_model_runs_only_where_that_was_said(self, command, questions_file, monkeypatch):
        asked = []
        monkeypatch.setattr(
            "transformers.AutoTokenizer.from_pretrained",
            lambda model, **options: asked.append(options["trust_remote_code"]) or ChatTokenizer(),
        )
        arguments = ["models/m", "-b", questions_file, "--template", "r1_distill", "--no-mlflow"]
        command(*arguments, "--out", "a")
        assert (FakeEngine.arguments["trust_remote_code"], asked.pop()) == (False, False)
        command(*arguments, "--out", "b", "--trust-remote-code")
        assert (FakeEngine.arguments["trust_remote_code"], asked.pop()) == (True, True)

    def test_small_models_need_no_budget_named(self, command, questions_file):
        command("models/m", "-b", questions_file, "--template", "no", "--no-mlflow")
        (folder,) = Path("runs/eval").iterdir()
        kept = json.loads((folder / "settings.json").read_text())
        assert (kept["max_context"], kept["max_tokens"]) == (50, 25)

    @pytest.mark.parametrize("where", ["warm_up", "generate"])
    def test_an_engine_that_dies_is_one_sentence(self, command, questions_file, monkeypatch, where):
        async def dies(*arguments):
            raise EngineLostError('the engine died (SIGILL: model.dtype = "float32" may avoid it)')

        monkeypatch.setattr(FakeEngine, where, dies)
        with pytest.raises(
            RunFailedError, match=r"^the engine died \(SIGILL: --dtype float32 may avoid it\); the"
        ):
            command("models/m", "-b", questions_file, "--template", "no", "--no-mlflow")

    def test_our_own_defects_keep_their_traceback(self, command, questions_file, monkeypatch):
        async def fails(*arguments):
            raise ZeroDivisionError

        monkeypatch.setattr(FakeEngine, "generate", fails)
        with pytest.raises(ExceptionGroup):
            command("models/m", "-b", questions_file, "--template", "no", "--no-mlflow")

    def test_other_settings_in_the_same_folder(self, command, questions_file):
        arguments = ["models/m", "-b", questions_file, "--max-tokens", "20", "--no-mlflow", "--out", "here"]
        command(*arguments, "--template", "no")
        with pytest.raises(UserError, match="template = 'no', not 'qwen_math'"):
            command(*arguments)


class TestNewestExport:
    def checkpoint(self, folder: Path, step: int, *, complete: bool = True) -> Path:
        export = folder / "checkpoints" / f"step-{step:06d}" / "hf"
        export.mkdir(parents=True)
        if complete:
            (export / "config.json").write_text("{}")
        return export

    def test_is_the_last_complete_one(self, tmp_path):
        assert newest_model(tmp_path) is None
        newest = self.checkpoint(tmp_path, 10)
        self.checkpoint(tmp_path, 5)
        self.checkpoint(tmp_path, 20, complete=False)
        assert newest_model(tmp_path) == newest

    def test_none_yet(self, command):
        Path("runs/r").mkdir(parents=True)
        Path("runs/r/recipe.toml").write_text('[model]\npath = "m"\n[data]\ntrain = "demo-train"\n')
        with pytest.raises(UserError, match=r"^--run: the run in .* has no exported checkpoint yet"):
            command("--run", "r")


def test_decisive_settings_exist():
    assert set(offline_eval._DECISIVE) <= set(EvalPlan.__dataclass_fields__)
