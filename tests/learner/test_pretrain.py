"""`slipstream pretrain` on a budget of seconds: it learns, is repeatable, saves whole folders, refuses mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from common.errors import UserError
from common.tasks.minimath import minimath
from common.tasks.templates import get_template
from deploy.pretrain import pretrain as pretrain_command
from learner import pretrain as stage
from learner.pretraining.probe import accuracy, by_family, probe
from learner.schedule import lr_factor

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = REPOSITORY / "recipes" / "pretrain-minimath-base.toml"
BASE = REPOSITORY / "models" / "minimath-base"
TINY = [
    "model.layers=1",
    "model.hidden=32",
    "model.ffn=64",
    "train.steps=12",
    "train.rows=8",
    "train.warmup=2",
    "probe.questions=4",
    "probe.samples=2",
    "probe.max_tokens=16",
]


def tiny(out: Path, *overrides: str) -> stage.PretrainRecipe:
    return stage.load_pretrain_recipe(SHIPPED, [*TINY, f'out="{out}"', *overrides])


def test_the_shipped_recipe_runs_on_a_small_budget(tmp_path: Path) -> None:
    losses = []
    report = stage.pretrain(
        tiny(tmp_path / "m", "train.steps=60"), progress=lambda step, loss, tokens: losses.append(loss)
    )
    assert len(losses) == 60
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert 0 <= report.pass1 <= 1
    assert {p.name for p in report.out.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    figures = json.loads((report.out / "probe.json").read_text())
    assert figures["parameters"] == report.parameters
    again = stage.load_pretrain_recipe(report.out / "pretrain.toml")
    assert again == tiny(tmp_path / "m", "train.steps=60")


def test_the_same_seed_gives_the_same_model(tmp_path: Path) -> None:
    models = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        report = stage.pretrain(tiny(tmp_path / name, f"seed={seed}"))
        models.append(AutoModelForCausalLM.from_pretrained(report.out).state_dict())
    assert all(torch.equal(models[0][k], models[1][k]) for k in models[0])
    assert not all(torch.equal(models[0][k], models[2][k]) for k in models[0])


@pytest.mark.parametrize("tied", ["true", "false"])
def test_saved_folders_load_as_plain_hugging_face_models(tied: str, tmp_path: Path) -> None:
    report = stage.pretrain(tiny(tmp_path / "m", f"model.tie_embeddings={tied}"))
    model = AutoModelForCausalLM.from_pretrained(report.out)
    tokenizer = AutoTokenizer.from_pretrained(report.out)
    assert model.config.model_type == "qwen2"
    assert model.config.tie_word_embeddings == (tied == "true")
    shared = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert shared == (tied == "true")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.vocab_size >= len(tokenizer)
    assert model.config._attn_implementation != "eager"


def test_training_goes_on_from_a_given_model(tmp_path: Path) -> None:
    first = stage.pretrain(tiny(tmp_path / "first", "train.steps=30"))
    losses: list[float] = []
    recipe = tiny(tmp_path / "second", f'init_from="{first.out}"', "train.lr=1e-4")
    stage.pretrain(recipe, progress=lambda step, loss, tokens: losses.append(loss))
    # A fresh model starts at ln(272) = 5.6 nats or above.
    assert losses[0] < 4.8
    with pytest.raises(UserError, match="another vocabulary"):
        stage.pretrain(
            tiny(
                tmp_path / "third",
                f'init_from="{first.out}"',
                'tokenizer.templates=["prime_zero", "r1", "few_shot"]',
            )
        )


def test_a_missing_model_to_go_on_from_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="init_from: '.*nosuch' is no model folder"):
        stage.pretrain(tiny(tmp_path / "m", f'init_from="{tmp_path / "nosuch"}"'))


def test_an_unwritable_place_is_noticed_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="out: cannot write"):
        stage.pretrain(tiny(tmp_path / "file" / "m"))


def test_an_existing_folder_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    out = tmp_path / "m"
    out.mkdir()
    (out / "precious").write_text("data")
    with pytest.raises(UserError, match="exists"):
        stage.pretrain(tiny(out))
    assert (out / "precious").read_text() == "data"
    stage.pretrain(tiny(out), overwrite=True)
    assert not (out / "precious").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_failure_while_saving_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "m"
    stage.pretrain(tiny(out))
    before = (out / "model.safetensors").read_bytes()

    def full(*args: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stage, "_probe_json", full)
    with pytest.raises(OSError, match="No space left"):
        stage.pretrain(tiny(out, "seed=5"), overwrite=True)
    assert (out / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rate=1", r"train.learning_rate.*lr"),
        ("model.heads=3", "must divide"),
        ("flaws.misconception=0.95", "below 1"),
        ("train.row_tokens=5000", "model.context"),
        ('probe.set="nosuch"', "valid ones: orz-mini"),
        ('tokenizer.templates=["nosuch"]', "valid ones: r1"),
        ('mixture=[{template="nosuch"}]', "valid ones: r1"),
        ('mixture=[{set="nosuch"}]', "valid ones: orz-mini"),
        ('mixture=[{families=["nosuch"]}]', "valid ones: arithmetic"),
        ("mixture=[]", "mixture"),
    ],
)
def test_mistakes_are_refused_before_training(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        tiny(tmp_path / "m", override)


def test_schedule_rises_then_falls_to_zero() -> None:
    factors = [lr_factor("cosine", 10, 100)(step) for step in range(100)]
    assert factors[:11] == sorted(factors[:11])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert max(factors) == 1.0
    assert 0 < factors[-1] < 0.01


def test_command_line(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(pretrain_command)
    arguments = [str(SHIPPED), "--set", f'out="{tmp_path / "m"}"']
    for override in TINY:
        arguments += ["--set", override]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "mean tokens" in result.output
    assert (tmp_path / "m" / "model.safetensors").is_file()


def test_the_shipped_model_is_what_the_recipe_describes() -> None:
    recipe = stage.load_pretrain_recipe(SHIPPED)
    assert stage.load_pretrain_recipe(BASE / "pretrain.toml") == recipe
    model = AutoModelForCausalLM.from_pretrained(BASE)
    assert model.num_parameters() <= 1_500_000
    assert sum(p.stat().st_size for p in BASE.iterdir()) <= 5_000_000


def test_the_shipped_model_answers_some_and_gets_many_wrong() -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)
    samples = probe(
        model, tokenizer, minimath("demo-heldout"), get_template("qwen_math"), samples=2, max_tokens=64
    )
    # 260 samples: three standard errors are 0.09.
    recorded = json.loads((BASE / "probe.json").read_text())["pass1"]
    assert recorded < 0.5
    assert accuracy(samples) == pytest.approx(recorded, abs=0.09)
    assert min(by_family(samples).values()) > 0.1
