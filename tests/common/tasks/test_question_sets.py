"""Loading question sets from files, folders and names; what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from common.recipe import Recipe
from common.tasks import sets
from common.tasks.from_recipe import held_out_questions, training_questions
from common.tasks.sets import doubtful_golds, load_questions

SHARED = Path(os.environ.get("SLIPSTREAM_SHARED", Path(__file__).resolve().parents[3].parent / "shared"))
ROWS = [
    {"problem": "1+1=?", "answer": "2", "level": "Level 3"},
    {"problem": "1/2=?", "answer": 0.5, "level": 5},
    {"problem": "x^2=4, x=?", "answer": ["2", "-2"], "level": "n/a"},
    {"problem": "3*4=?", "answer": 12},
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n", encoding="utf-8")
    return path


def test_json_lines_keep_the_type_of_each_answer(file: Path) -> None:
    loaded = load_questions(str(file))
    assert [row["answer"] for row in loaded] == ["2", 0.5, ["2", "-2"], 12]
    assert [row.get("level") for row in loaded] == [3, 5, None, None]
    assert len({row["uid"] for row in loaded}) == 4


def test_integers_that_no_message_holds_become_text(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(f'{{"problem": "q", "answer": [{10**30}, {2**62}]}}', encoding="utf-8")
    assert load_questions(str(path))[0]["answer"] == [str(10**30), 2**62]


def test_a_reward_of_ones_own_sees_every_field_that_a_message_can_hold(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    row = {
        "problem": "q",
        "answer": 1,
        "numbers": [1, 2],
        "tests": {"in": None, "big": 2**70},
        "level": "Level 2",
    }
    path.write_text(json.dumps(row)[:-1] + ', "nan": NaN}', encoding="utf-8")
    tree = {"model": {"path": "m"}, "data": {"train": str(path), "reward": "common.tasks.countdown:reward"}}
    (kept,) = training_questions(Recipe.model_validate(tree))
    assert kept["numbers"] == [1, 2]
    assert kept["tests"] == {"in": None, "big": str(2**70)}
    assert kept["level"] == 2
    assert "nan" not in kept
    (known,) = training_questions(
        Recipe.model_validate({"model": {"path": "m"}, "data": {"train": str(path)}})
    )
    assert known.keys() == {"uid", "problem", "answer", "level"}


def test_gold_answers_that_are_never_right_are_counted() -> None:
    rows = [{"answer": answer} for answer in ("", "we add\n#### 7", " ", 7, ["7"])]
    empty, worked = doubtful_golds(rows)
    assert empty.startswith("2 of 5 gold answers are empty")
    assert worked.startswith("1 of 5 gold answers contain '####'")
    assert doubtful_golds(rows[3:]) == []


@pytest.mark.parametrize(
    ("row", "setting"),
    [
        ({"question": "q", "answer": 1}, "data.problem_field"),
        ({"problem": "q", "gold": 1}, "data.answer_field"),
    ],
)
def test_a_field_that_a_recipe_can_name(row: dict, setting: str, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    tree = {"model": {"path": "m"}, "data": {"train": str(path)}, "eval": {"sets": [str(path)]}}
    recipe = Recipe.model_validate(tree)
    with pytest.raises(UserError, match=rf"^data\.train: .*name the right one in {setting}$"):
        training_questions(recipe)
    with pytest.raises(UserError, match=r"^eval\.sets: .*have it under the name '(problem|answer)'$"):
        held_out_questions(recipe)


def test_levels_and_limit(file: Path) -> None:
    assert [r["problem"] for r in load_questions(str(file), levels=[3, 5])] == ["1+1=?", "1/2=?"]
    assert len(load_questions(str(file), levels=[3, 5], limit=1)) == 1
    with pytest.raises(UserError, match="no question of the levels"):
        load_questions(str(file), levels=[4])


def test_field_names_can_be_given(tmp_path: Path) -> None:
    path = tmp_path / "named.jsonl"
    path.write_text('{"prompt": "1+1=?", "gold": 2}\n', encoding="utf-8")
    loaded = load_questions(str(path), problem_field="prompt", answer_field="gold")
    assert (loaded[0]["problem"], loaded[0]["answer"]) == ("1+1=?", 2)


def test_a_missing_field_is_named_with_the_present_ones(file: Path) -> None:
    with pytest.raises(UserError, match=r"no field 'question'; it has problem, answer"):
        load_questions(str(file), problem_field="question")


@pytest.mark.parametrize("kind", ["parquet", "arrow", "folder", "split"])
def test_arrow_parquet_and_saved_folders(kind: str, tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_list(
        [{"problem": "1+1=?", "answer": "2"}, {"problem": "2+2=?", "answer": "4"}]
    )
    path = tmp_path / "saved"
    if kind == "parquet":
        path = path.with_suffix(".parquet")
        table.to_parquet(path)
    elif kind == "split":
        datasets.DatasetDict({"eval": table}).save_to_disk(path)
    else:
        table.save_to_disk(path)
        path = next(path.glob("*.arrow")) if kind == "arrow" else path
    loaded = load_questions(str(path), split="eval")
    assert [row["answer"] for row in loaded] == ["2", "4"]


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_list([{"problem": "1+1=?", "answer": "2"}])
    datasets.DatasetDict({"eval": table}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match=r"no split 'train'; it has eval"):
        load_questions(str(tmp_path / "saved"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{broken", "line 1: not JSON"),
        ("[1]", "line 1: not a JSON object"),
        ('{"problem": "", "answer": 1}', "'problem' is not a question text"),
        ('{"problem": "q", "answer": null}', "'answer' is not a string"),
        ('{"problem": "q", "answer": [null]}', "'answer' is not a string"),
        ('{"problem": "q", "answer": []}', "'answer' is not a string"),
        ('{"problem": "q", "answer": true}', "'answer' is not a string"),
        ('{"problem": "q", "answer": ["2", false]}', "'answer' is not a string"),
        ('{"problem": "q", "answer": NaN}', "'answer' is not a string, a finite number"),
        ("", "holds no question"),
    ],
)
def test_unusable_files_are_refused_in_one_sentence(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        load_questions(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nosuch", r"unknown question set 'nosuch'; valid ones: orz-mini.*olympiad_bench"),
        ("./nosuch.jsonl", "does not exist"),
        ("/nosuch/folder", "does not exist"),
    ],
)
def test_what_does_not_exist_is_refused(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_questions(spec)


def test_no_network_asks_for_a_local_path(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("name resolution failed\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.delenv(sets.DATA_VARIABLE, raising=False)
    with pytest.raises(UserError, match=r"name resolution failed\).*give a local path.*orz_57k\.jsonl"):
        load_questions("orz_57k")


def test_paper_sets_look_in_the_data_folder_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "orz_57k.jsonl").write_text('{"problem": "1+1=?", "answer": "2"}\n', encoding="utf-8")
    assert load_questions("orz_57k", data_dir=tmp_path)[0]["uid"] == "orz_57k/0"
    monkeypatch.setenv(sets.DATA_VARIABLE, str(tmp_path))
    assert len(load_questions("orz_57k")) == 1


def test_gsm8k_on_the_hub_is_train_only_and_answers_are_cut_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = {}

    def hub(repository: str, config: str | None, *, split: str) -> list[dict]:
        asked.update(repository=repository, config=config, split=split)
        return [{"question": "2 bags of 3?", "answer": "2*3 = <<2*3=6>>6\n#### 6"}]

    monkeypatch.setattr(datasets, "load_dataset", hub)
    monkeypatch.delenv(sets.DATA_VARIABLE, raising=False)
    loaded = load_questions("gsm8k")
    assert (loaded[0]["problem"], loaded[0]["answer"]) == ("2 bags of 3?", "6")
    assert asked == {"repository": "openai/gsm8k", "config": "main", "split": "train"}


def test_a_hub_id_may_name_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda repository, config, *, split: asked.append((repository, config, split)) or ROWS,
    )
    load_questions("all@open-r1/Big-Math-RL-Verified-Processed", split="test")
    assert asked == [("open-r1/Big-Math-RL-Verified-Processed", "all", "test")]


def test_minimath_loads_by_the_same_door() -> None:
    row = load_questions("mini-minerva", levels=[3], limit=5)[0]
    assert {"uid", "problem", "answer", "solution", "family", "level"} <= set(row)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("gsm8k", 7473),
        ("asdiv", 1788),
        ("math_12k", 12000),
        ("math_lvl3to5_8k", 8523),
        ("aime", 30),
        ("amc", 83),
        ("math500", 500),
        ("minerva", 272),
        ("olympiad_bench", 675),
    ],
)
def test_real_sets_load_whole(name: str, size: int) -> None:
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("the shared data folder is not there")
    assert len(load_questions(name, data_dir=folder)) == size


def test_datasets_is_imported_only_when_needed(file: Path) -> None:
    code = (
        "import sys; from common.tasks.sets import load_questions; "
        f"load_questions({str(file)!r}); print('datasets' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
