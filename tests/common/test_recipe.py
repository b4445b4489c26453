"""A recipe that loads is consistent, and what does not load says which key is at fault."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from common.errors import UserError
from common.recipe import Recipe, find_recipe, load_recipe, load_toml_model, resolved_toml
from learner.pretraining.recipe import PretrainRecipe

MINIMAL = '[model]\npath = "m"\n[data]\ntrain = "demo"\n'


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(MINIMAL)
    return path


def test_defaults_are_table_6(minimal: Path) -> None:
    r = load_recipe(minimal)
    assert (r.rollout.group_size, r.rollout.temperature, r.rollout.max_tokens) == (8, 1.0, 3000)
    assert (r.rollout.top_p, r.rollout.top_k) == (1.0, -1)
    assert (r.batch.questions_per_step, r.batch.optimizer_steps) == (128, 8)
    assert r.responses_per_step == 1024
    assert r.responses_per_optimizer_step == 128
    assert (r.learner.lr, r.learner.betas, r.learner.weight_decay) == (1e-6, (0.9, 0.95), 0.0)
    assert (r.learner.max_grad_norm, r.learner.schedule, r.algorithm.epochs) == (1.0, "constant", 1)
    assert (r.algorithm.kl_beta, r.algorithm.kl_in_reward, r.algorithm.preset) == (0.0, 0.0, "dr_grpo")
    assert r.normaliser == 3000.0
    assert r.sequences_leased == 256 + 32
    assert r.learner.critic_lr == 9e-6


def test_a_whole_group_waits_even_for_a_few_slots(minimal: Path) -> None:
    assert load_recipe(minimal, ["actor.max_sequences=16"]).sequences_leased == 16 + 8


def test_name_defaults_to_the_file(minimal: Path) -> None:
    assert load_recipe(minimal).run.name == "tiny"
    assert load_recipe(minimal, ["run.name=other"]).folder == Path("runs/other")


def test_a_file_whose_name_cannot_be_a_folders(tmp_path: Path) -> None:
    """It would be written to the run folder's recipe, which could then not be read again."""
    file = tmp_path / "my recipe.toml"
    file.write_text(MINIMAL)
    with pytest.raises(UserError, match=r"^run\.name: the file's name 'my recipe'"):
        load_recipe(file)
    assert load_recipe(file, ["run.name=mine"]).run.recipe == "my recipe"


def test_resolved_recipe_reads_back_equal(minimal: Path, tmp_path: Path) -> None:
    recipe = load_recipe(minimal, ['data.template="a {question}\\n\\"b\\""', "eval.sets=['x', 'y']"])
    again = tmp_path / "again.toml"
    again.write_text(resolved_toml(recipe))
    assert load_recipe(again) == recipe
    assert tomllib.loads(resolved_toml(recipe))["data"]["template"] == 'a {question}\n"b"'


def test_precedence_is_override_file_parent_default(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(MINIMAL + "[learner]\nlr = 1e-3\nzero_stage = 1\nwarmup_steps = 7\n")
    child = tmp_path / "child.toml"
    child.write_text('extends = "base.toml"\n[learner]\nlr = 1e-4\nzero_stage = 3\n')
    learner = load_recipe(child, ["learner.lr=1e-5"]).learner
    assert (learner.lr, learner.zero_stage, learner.warmup_steps, learner.ranks) == (1e-5, 3, 7, 1)


def test_extends_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('extends = "b.toml"\n')
    (tmp_path / "b.toml").write_text('extends = "a.toml"\n')
    with pytest.raises(UserError, match="extends itself"):
        load_recipe(tmp_path / "a.toml")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("learner.lrr=1", ["learner.lrr", "did you mean 'lr'"]),
        ("nothing.x=1", ["nothing", "valid here: run, model"]),
        ("rollout.top_p=0.9", ["top_p must be 1.0"]),
        ("rollout.top_k=50", ["top_k must be -1"]),
        ("rollout.group_size=1", ["rollout.group_size = 1", "baseline"]),
        ("rollout.max_tokens=4096", ["rollout.max_tokens", "model.max_context"]),
        ("batch.optimizer_steps=7", ["batch.optimizer_steps", "1024"]),
        ("learner.lr=fast", ["learner.lr", "'fast'"]),
        ("learner.lr=-1", ["learner.lr", "greater than 0"]),
        ("learner.zero_stage=4", ["learner.zero_stage"]),
        ("run.name='a/b'", ["run.name"]),
        ("run.name=.", ["run.name"]),
        ("run.name='..'", ["run.name"]),
        ("run.name=.hidden", ["run.name"]),
        ("run.name=" + 101 * "a", ["run.name"]),
        ("broker.lease_s=0.001", ["broker.lease_s", "heartbeat_s"]),
        ("broker.dead_after_s=1", ["broker.dead_after_s", "heartbeat_s"]),
        ("algorithm.preset='drgrpo'", ["algorithm.preset", "dr_grpo"]),
        ("batch.zero_variance='refill' algorithm.preset='ppo'", ["ppo", "batch.zero_variance"]),
        ("batch.zero_variance='refill' algorithm.advantage='none'", ["'none'", "batch.zero_variance"]),
        ("learner.lrr=1 nothing.x=1", ["learner.lrr: unknown key", "also unknown: nothing"]),
        (
            "run.steps=0 learner.lr=-1",
            ["run.steps: must be greater than 0 (given: 0); also wrong: learner.lr"],
        ),
        ("eval.sets=a", ['eval.sets: must be a list such as ["a", "b"] (given: \'a\')']),
        ("data.levels=3", ["data.levels: must be a list such as [1, 2]"]),
        ("learner.betas=[0.9]", ["learner.betas: must be a list such as [0.9, 0.95] (given: [0.9])"]),
        ("learner.betas=['x',0.9]", ["learner.betas: entry 1 must be a number"]),
        ("learner.betas=[2,3]", ["learner.betas: entry 1 must be less than 1 (given: 2)"]),
        ("run.steps=99999999999999999999999", ["run.steps: must be at most 1000000000 ("]),
        ("run.seed=99999999999999999999", ["run.seed: must be at most"]),
        ("broker.dead_after_s=1e300", ["broker.dead_after_s: must be at most"]),
        ("broker.port=70000", ["broker.port: must be at most 65535"]),
        ("learner.master_port=70000", ["learner.master_port: must be at most 65535"]),
        ("learner=3", ["learner: is a table, not a value; set one of its keys: ranks, "]),
        (
            "lora.target_modules=3",
            ['lora.target_modules: must be a list such as ["a", "b"] or \'all-linear\''],
        ),
        ("run.steps=1.5", ["run.steps: must be a whole number (given: 1.5)"]),
        ("model.trust_remote_code=5", ["model.trust_remote_code: must be true or false"]),
        ("run.root=3", ["run.root: must be a path"]),
        ("run.name=a_b,c", ["run.name: must be at most 100 letters, digits"]),
        ("learner.lr", ["--set", "section.key=value"]),
        ("learner.lr.x=1", ["--set"]),
    ],
)
def test_one_sentence_names_the_setting(minimal: Path, override: str, words: list[str]) -> None:
    overrides = ["learner.lr=1", override] if override.startswith("learner.lr.x") else override.split()
    with pytest.raises(UserError) as caught:
        load_recipe(minimal, overrides)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not re.search(r"Input|Field|valid (tuple|dict|string)|instance|pattern", str(caught.value))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[modle]\npath = "m"\n[data]\ntrain = "d"\n', "modle: unknown key; did you mean 'model'?"),
        ('[model]\n[data]\ntrain = "d"\n', "model.path: is missing: Hugging Face folder"),
        ('[model]\npath = "m"\n', "data: the table is missing; it needs train"),
    ],
)
def test_a_missing_setting_or_the_typo_that_hides_it(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "tiny.toml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(file)
    assert str(caught.value).startswith(words)


def test_bad_files_are_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text("[model\n")
    with pytest.raises(UserError, match="not valid TOML"):
        load_recipe(bad)
    bad.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot read"):
        load_recipe(bad)
    with pytest.raises(UserError, match="neither a TOML file nor one of the shipped recipes"):
        find_recipe("no-such-recipe")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("demoo", "there is no recipe 'demoo'; did you mean 'demo'?"),
        ("./nope-at-all.toml", "the file 'nope-at-all.toml' does not exist"),
        ("recipes/demoo.toml", "the file 'recipes/demoo.toml' does not exist; did you mean 'demo'?"),
        (
            "runs/demo",
            "'runs/demo' is a folder, not a recipe; that of the run in it is 'runs/demo/recipe.toml'",
        ),
        ("runs", "'runs' is a folder, not a recipe"),
        ("mine.txt", "'mine.txt' is no recipe: the name of a TOML file ends in '.toml'"),
        ("mine", "extends: there is no recipe 'pape'; did you mean 'paper'? (in mine.toml)"),
    ],
)
def test_what_is_not_found_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "recipe.toml").touch()
    (tmp_path / "mine.txt").touch()
    (tmp_path / "mine.toml").write_text('extends = "pape"\n')
    with pytest.raises(UserError) as caught:
        load_recipe(f"{name}.toml" if name == "mine" else name)
    assert str(caught.value) == words


def test_recipes_of_the_two_kinds_are_listed_apart_and_told_apart() -> None:
    with pytest.raises(
        UserError, match=r"recipes: .*demo, .*; for `slipstream pretrain`: .*zoo-chat"
    ) as caught:
        find_recipe("qqqqq")
    assert "zoo" not in str(caught.value).partition("; for")[0]
    with pytest.raises(
        UserError, match="^'zoo-chat' makes a base model: it is a recipe of `slipstream pretrain`"
    ):
        load_recipe("zoo-chat")
    with pytest.raises(
        UserError, match="^'demo' trains by reinforcement: it is a recipe of `slipstream run`"
    ):
        load_toml_model(PretrainRecipe, find_recipe("demo"))


def test_every_setting_says_what_it_is() -> None:
    for name, section in Recipe.model_fields.items():
        inner = next(
            (
                a
                for a in (section.annotation, *getattr(section.annotation, "__args__", ()))
                if hasattr(a, "model_fields")
            ),
            None,
        )
        assert inner is not None, name
        for key, field in inner.model_fields.items():
            assert field.description, f"{name}.{key} has no description"
