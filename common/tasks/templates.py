"""Prompt templates, to the character (paper section 2.1), with their stop rules and answer extraction.

Invariant: a template's string never changes silently; tests pin each by its SHA-256. Source of the strings:
sail-sg/understand-r1-zero, `train_zero_math.py` and `evaluate_model.py`. The 4-shot exemplars are our own,
because the paper publishes none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from common.errors import UserError

Extraction = Literal["boxed", "answer_tag", "answer"]
PLACEHOLDER = "{question}"

_R1_RULES = (
    "The reasoning process is enclosed within <think> </think> and answer is enclosed within <answer> </answer> "
    "tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>."
)
_R1_OPENING = (
    "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The "
    "Assistant first thinks about the reasoning process in the mind and then provides the User with the answer. "
)
_QWEN_MATH = (
    "<|im_start|>system\n"
    "Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
    "<|im_start|>user\n{question}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
_PRIME_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The "
    "assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
    "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
    "respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. "
    "User: {question}\n\nPresent the answer in LaTex format: \\boxed{Your answer}. Assistant:"
)
# The original is a pair of Jinja templates; Jinja drops the newline after the question.
_OPEN_REASONER_ZERO = (
    _R1_OPENING
    + _R1_RULES
    + " User: You must put your answer inside <answer> </answer> tags, i.e., <answer> "
    "answer here </answer>. And your final answer will be extracted automatically by the \\boxed{} tag.\n"
    "This is the problem:\n{question}\nAssistant: <think>"
)
_FEW_SHOT = (
    "Question: 6 bags of 4 eggs, 5 break. How many are left?\n"
    "Answer: 6*4=24\n24-5=19\n\\boxed{19}\n\n"
    "Question: 4x-7=21, x=?\n"
    "Answer: 21+7=28\n28/4=7\n\\boxed{7}\n\n"
    "Question: What is 3/8+1/8?\n"
    "Answer: 3+1=4\n4/8=1/2\n\\boxed{1/2}\n\n"
    "Question: A square has perimeter 36. Area?\n"
    "Answer: 36/4=9\n9*9=81\n\\boxed{81}\n\n"
    "Question: {question}\nAnswer:"
)


@dataclass(frozen=True)
class Template:
    """How a question becomes a prompt, where generation stops, and where the answer is read.

    Attributes:
        name: registry name, or `custom`.
        render: question text to prompt text.
        stop: strings at which generation stops; empty means the model's own end-of-sequence token.
        include_stop: whether the stop string stays in the response (the answer tag's rule needs it).
        extraction: `boxed` reads the last `\\boxed{}`, `answer_tag` the `<answer>` element after `</think>`, `answer`
            any.
    """

    name: str
    render: Callable[[str], str]
    stop: list[str] = field(default_factory=list)
    include_stop: bool = False
    extraction: Extraction = "boxed"


def _fill(text: str, question: str) -> str:
    """Only the placeholder is replaced: other braces (`\\boxed{}`) are the template's own."""
    head, _, tail = text.partition(PLACEHOLDER)
    return head + question + tail


@dataclass(frozen=True)
class _Entry:
    text: str
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    extraction: Extraction = "boxed"
    chat: bool = False  # the text is the user's message; the model's own chat template goes around it


_REGISTRY: dict[str, _Entry] = {
    "r1": _Entry(
        _R1_OPENING + _R1_RULES + "\nUser: {question}\nAssistant: <think>", ("</answer>",), True, "answer_tag"
    ),
    "qwen_math": _Entry(_QWEN_MATH),
    "no": _Entry("{question}"),
    "prime_zero": _Entry(_PRIME_ZERO),
    "open_reasoner_zero": _Entry(_OPEN_REASONER_ZERO, ("</answer>",), True, "answer"),
    "llama_instruct": _Entry(
        "{question}\nPlease reason step by step, and put your final answer within \\boxed{}.\n\n", chat=True
    ),
    "r1_distill": _Entry("{question}", chat=True),
    "few_shot": _Entry(_FEW_SHOT, ("\n\nQuestion:",)),
}
TEMPLATES = tuple(_REGISTRY)


def template_text(name: str) -> str:
    """The registered string with `{question}` in place (for chat templates: the user's message)."""
    return _entry(name).text


def get_template(spec: str, *, model: str | None = None, trust_remote_code: bool = False) -> Template:
    """The template of a name, or a custom one from a string that contains `{question}`.

    A custom template that mentions `<answer>` stops at `</answer>` and is scored by the answer tag; any other
    is scored by `\\boxed{}` and stops at the model's end-of-sequence token.

    Args:
        spec: registry name (`TEMPLATES`) or a string with `{question}`.
        model: path or hub id whose tokenizer's chat template `llama_instruct` and `r1_distill` wrap around
            the question; other templates ignore it.
        trust_remote_code: run code that comes with that tokenizer.

    Raises:
        UserError: unknown name, or a chat template without a model that has one.
    """
    if PLACEHOLDER in spec and spec not in _REGISTRY:
        return _custom(spec)
    entry = _entry(spec)
    if entry.chat:
        tokenizer = _chat_tokenizer(spec, model, trust_remote_code)
        render = functools.partial(_render_chat, entry.text, tokenizer)
    else:
        render = functools.partial(_fill, entry.text)
    return Template(spec, render, list(entry.stop), entry.include_stop, entry.extraction)


def _entry(name: str) -> _Entry:
    if name not in _REGISTRY:
        raise UserError(
            f"unknown template '{name}'; valid ones: {', '.join(TEMPLATES)}, or a string with {PLACEHOLDER}"
        )
    return _REGISTRY[name]


def _custom(text: str) -> Template:
    render = functools.partial(_fill, text)
    if "<answer>" in text:
        return Template("custom", render, ["</answer>"], True, "answer_tag")
    return Template("custom", render)


@functools.lru_cache(maxsize=4)
def _chat_tokenizer(name: str, model: str | None, trust_remote_code: bool):
    if model is None:
        raise UserError(f"template '{name}' uses the model's chat template: name the model")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    if not tokenizer.chat_template:
        raise UserError(f"template '{name}' needs a chat template, and the tokenizer of '{model}' has none")
    return tokenizer


def _render_chat(text: str, tokenizer, question: str) -> str:
    message = [{"role": "user", "content": _fill(text, question)}]
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
