"""Pretraining text: tokenizer round trip, planted flaws in their shares, no evaluation question, packing."""

from __future__ import annotations

import itertools
import random
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from common.tasks.minimath import SETS, TRAIN, in_range, minimath
from common.tasks.templates import get_template
from learner.pretraining.corpus import Document, documents
from learner.pretraining.packing import batches
from learner.pretraining.recipe import PretrainRecipe
from learner.pretraining.tokenizer import END_OF_TEXT, build_tokenizer, template_pieces
from learner.pretraining.trainer import build_model

TOKENIZER = build_tokenizer(["qwen_math", "r1"], ["\\boxed{"])
QWEN_PROMPT = re.compile(r"<\|im_start\|>user\n(.*)<\|im_end\|>\n<\|im_start\|>assistant\n$", re.DOTALL)


def recipe_of(**changes: object) -> PretrainRecipe:
    mixture = [{"kind": "qa", "template": "qwen_math", "set": "demo-train"}]
    return PretrainRecipe.model_validate({"mixture": mixture, **changes})


def take(recipe: PretrainRecipe, count: int, seed: int = 0) -> list[Document]:
    return list(itertools.islice(documents(recipe, random.Random(seed)), count))


def verdicts(docs: list[Document]) -> Counter:
    """right / guessed right / guessed wrong / wrong method, against MiniMath's own gold answers."""
    gold = {q.problem: q for q in minimath("demo-train")}
    counts: Counter = Counter()
    for doc in docs:
        question = gold.get(QWEN_PROMPT.search(doc.prompt).group(1))
        if question is None:
            continue
        answer = re.search(r"\\boxed\{(.*)\}", doc.response).group(1)
        counts["guess" if doc.response.startswith("\\boxed") else "worked", answer == question.answer] += 1
    return counts


@given(st.text())
def test_tokenizer_round_trip(text: str) -> None:
    text = unicodedata.normalize("NFC", text)
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


def test_printable_ascii_is_one_token_per_character() -> None:
    text = "".join(map(chr, range(32, 127))) + "\n"
    assert len(build_tokenizer()(text)["input_ids"]) == len(text)


def test_template_text_and_special_tokens_are_single_tokens() -> None:
    question = "12+30=?"
    prompt = get_template("qwen_math").render(question)
    assert len(TOKENIZER(prompt)["input_ids"]) == len(question) + 10
    assert len(TOKENIZER(get_template("r1").render(question))["input_ids"]) == len(question) + 2
    assert len(TOKENIZER("\\boxed{17}<|endoftext|>")["input_ids"]) == 5
    assert template_pieces("no") == []


def test_tokenizer_survives_saving(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    # Beside a model, transformers picks the class from the architecture.
    build_model(recipe_of(model={"layers": 1, "hidden": 32, "ffn": 32}), TOKENIZER).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = get_template("r1").render("½ of 6?\r\n") + "\\boxed{3}<|endoftext|>"
    assert loaded(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert type(loaded) is type(TOKENIZER)
    assert (loaded.eos_token, loaded.pad_token) == (END_OF_TEXT, END_OF_TEXT)


def test_chat_template_speaks_chatml() -> None:
    rendered = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": "1+1=?"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == "<|im_start|>user\n1+1=?<|im_end|>\n<|im_start|>assistant\n"


def test_chat_templates_take_the_models_own(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    plain = get_template("r1_distill", model=str(tmp_path)).render("{question} 1+1=?")
    assert plain == "<|im_start|>user\n{question} 1+1=?<|im_end|>\n<|im_start|>assistant\n"
    instructed = get_template("llama_instruct", model=str(tmp_path)).render("1+1=?")
    assert "1+1=?\nPlease reason step by step" in instructed


def test_flaws_come_in_their_shares() -> None:
    flaws = {"misconception": 0.4, "guess": 0.2}
    counts = verdicts(take(recipe_of(flaws=flaws), 4000))
    total = counts.total()
    assert total > 1000
    # Three standard errors of a share at this size are below 0.04; some questions have no misconception.
    assert counts["worked", False] / total == pytest.approx(0.4, abs=0.05)
    assert counts["guess", False] / total == pytest.approx(0.2 * 0.75, abs=0.04)
    assert counts["guess", True] / total == pytest.approx(0.2 * 0.25, abs=0.04)


def test_without_flaws_everything_is_right() -> None:
    counts = verdicts(take(recipe_of(flaws={"misconception": 0.0, "guess": 0.0}), 300))
    assert set(counts) == {("worked", True)}


def test_slips_spoil_right_methods() -> None:
    flaws = {"misconception": 0.0, "guess": 0.0, "slip": 0.3}
    counts = verdicts(take(recipe_of(flaws=flaws), 1000))
    assert counts["worked", False] > 0.2 * counts.total()


def test_no_evaluation_question_is_ever_seen() -> None:
    mixture = [{"template": "no", "set": name, "flawed": False} for name in SETS]
    docs = take(recipe_of(mixture=mixture), 3000)
    assert all(in_range(doc.prompt, TRAIN) for doc in docs)


def test_filler_follows_the_line_that_chooses_the_method() -> None:
    filler = {"share": 1.0, "more": 0.5, "most": 3, "phrases": ["check again."]}
    docs = take(recipe_of(filler=filler, flaws={"misconception": 0.5, "guess": 0.0}), 200)
    counts = Counter()
    for doc in docs:
        lines = doc.response.split("\n")
        run = len(list(itertools.takewhile(lambda line: line == "check again.", lines[1:])))
        assert "=" in lines[0]
        assert doc.response.count("check again.") == run
        counts[run] += 1
    assert set(counts) == {1, 2, 3}
    assert counts[1] > counts[3]


@pytest.mark.parametrize("template", ["no", "qwen_math", "r1", "User: {question}\nAssistant:"])
def test_question_answer_documents_follow_their_template(template: str) -> None:
    mixture = [{"kind": "qa", "template": template, "flawed": False}]
    for doc in take(recipe_of(mixture=mixture), 50):
        assert doc.response.endswith(END_OF_TEXT)
        if template == "r1":
            # The paper's strict rule: one space between the tags.
            assert re.search(r"</think> <answer>[^<]+</answer><\|endoftext\|>$", doc.response)
        else:
            assert re.search(r"\\boxed\{[^{}]+\}<\|endoftext\|>$", doc.response)
        assert doc.response.startswith("\n") == (not doc.prompt.endswith("\n"))


def test_other_kinds_of_text() -> None:
    lists = take(recipe_of(mixture=[{"kind": "exercises"}]), 20)
    assert all(doc.response.count("\n") >= 1 and "boxed" not in doc.response for doc in lists)
    facts = take(recipe_of(mixture=[{"kind": "facts", "families": ["arithmetic"], "levels": [1]}]), 20)
    assert all(re.fullmatch(r"(\d+[-+*]\d+=\d+\n?){5}<\|endoftext\|>", doc.response) for doc in facts)
    drills = take(recipe_of(mixture=[{"kind": "drill", "families": ["arithmetic"]}]), 20)
    assert all(re.fullmatch(r"-?\d+[-+*]\d+=", doc.prompt) for doc in drills)
    assert all(re.fullmatch(r"-?\d+<\|endoftext\|>", doc.response) for doc in drills)
    reflections = take(recipe_of(mixture=[{"kind": "reflection"}]), 20)
    assert all(re.search(r"recheck|check again|rethink", doc.response) for doc in reflections)


def test_dialogues_close_their_thought_and_tag_the_answer() -> None:
    dialogue = {"template": "User: {question}\nAssistant: <think>", "ending": "answer_tag"}
    for doc in take(recipe_of(mixture=[dialogue]), 20):
        assert re.search(r"\n</think> <answer>[^<]+</answer><\|endoftext\|>$", doc.response)


def test_reflection_phrases_can_be_chosen() -> None:
    docs = take(recipe_of(mixture=[{"kind": "reflection", "phrases": ["think again"]}]), 20)
    assert all(doc.response.count("think again") == 1 for doc in docs)


def test_mixture_weights_are_shares() -> None:
    mixture = [{"template": "no", "weight": 3.0}, {"template": "qwen_math", "weight": 1.0}]
    chat = sum("<|im_start|>" in doc.prompt for doc in take(recipe_of(mixture=mixture), 2000))
    assert chat / 2000 == pytest.approx(0.25, abs=0.04)


def test_text_depends_on_the_seed_alone() -> None:
    assert take(recipe_of(), 50, seed=1) == take(recipe_of(), 50, seed=1)
    assert take(recipe_of(), 50, seed=1) != take(recipe_of(), 50, seed=2)


def test_packing_keeps_documents_whole() -> None:
    recipe = recipe_of()
    stream = batches(documents(recipe, random.Random(0)), TOKENIZER, rows=8, row_tokens=96, prompt_weight=0.5)
    batch = next(stream)
    assert batch.input_ids.shape == batch.position_ids.shape == batch.weights.shape == (8, 96)
    for ids, positions, weights in zip(
        batch.input_ids.tolist(), batch.position_ids.tolist(), batch.weights.tolist(), strict=True
    ):
        starts = [i for i, p in enumerate(positions) if p == 0]
        for start, end in itertools.pairwise([*starts, len(ids)]):
            text = TOKENIZER.decode(ids[start:end])
            assert weights[start] == 0.0
            if any(weights[start:end]):
                assert QWEN_PROMPT.search(text.split("assistant\n")[0] + "assistant\n")
                assert text.count(END_OF_TEXT) == 1
                assert text.endswith(END_OF_TEXT)
                assert set(weights[start + 1 : end]) == {0.5, 1.0}
    assert (batch.weights > 0).float().mean() > 0.8


def test_a_packed_document_sees_only_itself() -> None:
    recipe = recipe_of(model={"layers": 2, "hidden": 32, "ffn": 64})
    model = build_model(recipe, TOKENIZER).eval()
    batch = next(
        batches(documents(recipe, random.Random(0)), TOKENIZER, rows=2, row_tokens=192, prompt_weight=1.0)
    )
    with torch.no_grad():
        packed = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits[0]
        starts = [i for i, p in enumerate(batch.position_ids[0].tolist()) if p == 0]
        start, end = starts[1], starts[2]
        alone = model(input_ids=batch.input_ids[:1, start:end], use_cache=False).logits[0]
    torch.testing.assert_close(packed[start:end], alone, atol=1e-5, rtol=1e-5)


def test_documents_longer_than_a_row_are_left_out() -> None:
    docs = itertools.cycle([Document("", "x" * 200), Document("q", "short" + END_OF_TEXT)])
    batch = next(batches(docs, TOKENIZER, rows=1, row_tokens=64, prompt_weight=1.0))
    assert TOKENIZER.decode(batch.input_ids[0]).replace(END_OF_TEXT, "").replace("qshort", "") == ""
