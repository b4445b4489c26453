"""Templates to the character: the SHA-256 of each string, rendering, stop rules, extraction."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from common.tasks.templates import TEMPLATES, get_template, template_text

# SHA-256 of the prompt for the question "1+1=?"; the first five and `llama_instruct` / `r1_distill` (the user's
# message) were computed from the source's own functions, `few_shot` pins our own exemplars.
PINNED = {
    "r1": "91221f5570fa01bcf609158973afb712eb442bf667ed80599c08090d5f1f5f10",
    "qwen_math": "24fc253a71cfd9a9ff351af2d67fe8732e118aaf0d8c91cb13312983c487513d",
    "no": "b9ab5b7f58369cf5558c951a9e13db37fd75fbab7c6b276f42b0abfaef5b96ab",
    "prime_zero": "80d09089525a1aa327a2dba1e5fe8890c6e81c810de267968ec2af91d2ecc22f",
    "open_reasoner_zero": "c4cbdf3baa0d5097bd88f0a8776f6e93d49cbd9b9e61bd18c5ce9d49b7a28dfb",
    "llama_instruct": "0fb56e1c8afd4e872403497cc1b2f4d0026d77bcc395c6ca3a4f93b33126d4b6",
    "r1_distill": "b9ab5b7f58369cf5558c951a9e13db37fd75fbab7c6b276f42b0abfaef5b96ab",
    "few_shot": "9a7599b2bbfffad542c8d2a2b6ef0feea68df9b986bad980307ed3a961908e6f",
}
CHAT = ("llama_instruct", "r1_distill")
PLAIN = [name for name in TEMPLATES if name not in CHAT]


@pytest.mark.parametrize("name", TEMPLATES)
def test_strings_are_pinned(name: str) -> None:
    text = template_text(name).replace("{question}", "1+1=?")
    assert hashlib.sha256(text.encode()).hexdigest() == PINNED[name]


def test_every_template_is_pinned() -> None:
    assert set(PINNED) == set(TEMPLATES)


@pytest.mark.parametrize("name", PLAIN)
@given(question=st.text(min_size=1))
def test_rendering_puts_the_question_in_unchanged(name: str, question: str) -> None:
    head, tail = template_text(name).split("{question}")
    assert get_template(name).render(question) == head + question + tail


def test_a_question_with_braces_is_left_alone() -> None:
    assert get_template("no").render("{question} \\boxed{}") == "{question} \\boxed{}"
    assert get_template("qwen_math").render("{question}").count("{question}") == 1


@pytest.mark.parametrize(
    ("name", "stop", "include_stop", "extraction"),
    [
        ("r1", ["</answer>"], True, "answer_tag"),
        ("open_reasoner_zero", ["</answer>"], True, "answer"),
        ("qwen_math", [], False, "boxed"),
        ("no", [], False, "boxed"),
        ("prime_zero", [], False, "boxed"),
        ("few_shot", ["\n\nQuestion:"], False, "boxed"),
    ],
)
def test_stop_rules_and_extraction(name: str, stop: list[str], include_stop: bool, extraction: str) -> None:
    template = get_template(name)
    assert (template.stop, template.include_stop, template.extraction) == (stop, include_stop, extraction)


def test_few_shot_has_four_exemplars() -> None:
    prompt = get_template("few_shot").render("1+1=?")
    assert prompt.count("\\boxed{") == 4
    assert prompt.count("Question: ") == 5


def test_custom_templates() -> None:
    boxed = get_template("Q: {question}\nA:")
    assert boxed.render("1+1=?") == "Q: 1+1=?\nA:"
    assert (boxed.name, boxed.stop, boxed.extraction) == ("custom", [], "boxed")
    tagged = get_template("{question} Reply in <answer> tags. <think>")
    assert (tagged.stop, tagged.include_stop, tagged.extraction) == (["</answer>"], True, "answer_tag")


def test_unknown_names_list_the_valid_ones() -> None:
    with pytest.raises(UserError, match=r"r1.*qwen_math.*prime_zero.*few_shot"):
        get_template("qwen-math")


def test_chat_templates_need_a_model() -> None:
    with pytest.raises(UserError, match="name the model"):
        get_template("llama_instruct")
