"""A character-level tokenizer in Hugging Face format.

Invariant: decode(encode(text)) == text for every text in Unicode normal form C. Each byte of UTF-8 is a token (so
printable ASCII is one token per character and nothing is unknown); special tokens and a few whole strings are one
token each. The class is Qwen2's own, because transformers and vLLM load it for every model of that architecture.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import AddedToken, pre_tokenizers
from transformers import Qwen2Tokenizer

from common.tasks.templates import PLACEHOLDER, template_text

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)
_SHORTEST_PIECE = 4
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tokenizer(
    templates: Iterable[str] = (), strings: Iterable[str] = (), context: int = 1024
) -> Qwen2Tokenizer:
    """Builds the tokenizer.

    Args:
        templates: registered templates whose fixed text becomes one token per piece.
        strings: further strings that become one token each.
        context: longest sequence in tokens, recorded as `model_max_length`.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(
        vocab={char: i for i, char in enumerate(alphabet)},
        merges=[],
        additional_special_tokens=[IM_START, IM_END],
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE,
    )
    pieces = dict.fromkeys([*(p for name in templates for p in template_pieces(name)), *strings])
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    return tokenizer


def template_pieces(name: str) -> list[str]:
    """The fixed text of a template, cut at the question and at special tokens; short pieces stay characters."""
    cuts = "|".join(re.escape(mark) for mark in (PLACEHOLDER, *SPECIAL_TOKENS))
    return [piece for piece in re.split(cuts, template_text(name)) if len(piece) >= _SHORTEST_PIECE]
