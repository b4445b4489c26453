"""How well a small model answers: plain Hugging Face sampling, without an engine.

Invariant: samples come from the model's own distribution at temperature 1 (no top-p, no top-k), so the accuracy
is pass@1 as the training run will see it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, Qwen2Tokenizer

from common.tasks.minimath import Question
from common.tasks.templates import Template
from common.verifier import Outcome, grade


@dataclass(frozen=True)
class Sample:
    """One response: its text up to the end token, its token count (end token included), its verdict."""

    question: Question
    text: str
    tokens: int
    finished: bool
    correct: bool


@torch.inference_mode()
def sample_responses(
    model: PreTrainedModel,
    tokenizer: Qwen2Tokenizer,
    prompts: list[str],
    *,
    samples: int = 1,
    max_tokens: int = 64,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Token ids [len(prompts) * samples, <= max_tokens], padded after the end token; temperature 0 is greedy."""
    # Not padding=True: that would stay set in the tokenizer and be saved with it.
    encoded = tokenizer.pad(tokenizer(prompts), padding_side="left", return_tensors="pt")
    output = model.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        do_sample=temperature > 0,
        temperature=temperature or None,
        top_k=0,
        top_p=1.0,
        num_return_sequences=samples,
        max_new_tokens=max_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return output[:, encoded["input_ids"].shape[1] :]


def probe(
    model: PreTrainedModel,
    tokenizer: Qwen2Tokenizer,
    questions: list[Question],
    template: Template,
    *,
    samples: int,
    max_tokens: int,
    seed: int = 0,
    batch: int = 32,
) -> list[Sample]:
    """Samples and grades; `samples` responses per question at temperature 1."""
    torch.manual_seed(seed)
    results: list[Sample] = []
    for start in range(0, len(questions), batch):
        some = questions[start : start + batch]
        ids = sample_responses(
            model,
            tokenizer,
            [template.render(q.problem) for q in some],
            samples=samples,
            max_tokens=max_tokens,
        )
        for i, row in enumerate(ids.tolist()):
            results.append(_graded(some[i // samples], row, tokenizer, template))
    return results


def accuracy(samples: Iterable[Sample]) -> float:
    """Share of correct responses: pass@1."""
    verdicts = [s.correct for s in samples]
    return sum(verdicts) / len(verdicts)


def by_family(samples: Iterable[Sample]) -> dict[str, float]:
    """pass@1 for each family."""
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.question.family].append(sample)
    return {family: accuracy(group) for family, group in sorted(groups.items())}


def _graded(question: Question, row: list[int], tokenizer: Qwen2Tokenizer, template: Template) -> Sample:
    finished = tokenizer.eos_token_id in row
    tokens = row.index(tokenizer.eos_token_id) if finished else len(row)
    text = tokenizer.decode(row[:tokens])
    verdict = grade(text, question.answer, template=template.extraction).verdict
    return Sample(question, text, tokens + finished, finished, finished and verdict is Outcome.CORRECT)
