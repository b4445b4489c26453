"""Questions to prompt token ids.

Invariant: a prompt is tokenised once, here, and travels as ids from then on; it begins with at most one
beginning-of-sequence token, also when a chat template writes one as text (paper section 2.1: the reference
strips it because the engine adds its own).
"""

from __future__ import annotations

from typing import Any

from common.tasks.templates import Template


class Prompts:
    """Renders and tokenises questions.

    Args:
        tokenizer: the model's (transformers).
        template: how a question becomes a prompt.
    """

    def __init__(self, tokenizer: Any, template: Template) -> None:
        self.template = template
        self._tokenizer = tokenizer

    def encode(self, problem: str) -> list[int]:
        """Prompt ids of a question."""
        text = self.template.render(problem)
        begin = self._tokenizer.bos_token
        has_begin = bool(begin) and text.startswith(begin)
        return self._tokenizer(text, add_special_tokens=not has_begin)["input_ids"]
