"""The pretraining text: an endless stream of documents drawn from the recipe's mixture.

Invariant: every question lies in MiniMath's training range, so no evaluation question is ever seen; and a
flawed working is wrong from the line where its method is chosen, not by noise sprinkled over it (unless the
recipe asks for slips).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from common.tasks.minimath import SETS, TRAIN, Exercise, Working, draw, grid, in_range
from common.tasks.templates import Template, get_template
from learner.pretraining.recipe import MixtureItem, PretrainRecipe
from learner.pretraining.tokenizer import END_OF_TEXT

_GUESS_RIGHT = 0.25
_EXERCISES_PER_LIST = (2, 5)
_WORKINGS_PER_TEXT = 5


@dataclass(frozen=True)
class Document:
    """Text that is trained on: the prompt part may have a smaller weight in the loss."""

    prompt: str
    response: str


def documents(recipe: PretrainRecipe, rng: random.Random) -> Iterator[Document]:
    """Endless documents; each kind occurs in proportion to its weight."""
    writers = [_Writer(recipe, item, rng) for item in recipe.mixture]
    weights = [item.weight for item in recipe.mixture]
    while True:
        yield rng.choices(writers, weights)[0].write()


class _Writer:
    """Writes the documents of one mixture item."""

    def __init__(self, recipe: PretrainRecipe, item: MixtureItem, rng: random.Random) -> None:
        self._recipe, self._item, self._rng = recipe, item, rng
        self._parts = _parts(item)
        self._template: Template = get_template(item.template)
        self._ending = self._template.extraction if item.ending == "template" else item.ending
        self.write: Callable[[], Document] = getattr(self, f"_{item.kind}")

    def _exercise(self) -> Exercise:
        while True:
            exercise = draw(self._rng, *self._rng.choice(self._parts))
            if in_range(exercise.problem, TRAIN):
                return exercise

    def _qa(self) -> Document:
        exercise = self._exercise()
        return self._document(exercise, self._fill(self._attempt(exercise)))

    def _reflection(self) -> Document:
        """A first attempt, a second thought, then an attempt that need not be better."""
        exercise = self._exercise()
        first, second = self._attempt(exercise), self._attempt(exercise)
        thought = self._rng.choice(self._item.phrases)
        return self._document(exercise, Working((*first.lines, thought, *second.lines), second.answer))

    def _exercises(self) -> Document:
        problems = [self._exercise().problem for _ in range(self._rng.randint(*_EXERCISES_PER_LIST))]
        return Document("", "\n".join(problems) + END_OF_TEXT)

    def _facts(self) -> Document:
        lines = [line for _ in range(_WORKINGS_PER_TEXT) for line in self._exercise().work().lines]
        return Document("", "\n".join(lines) + END_OF_TEXT)

    def _drill(self) -> Document:
        """One line of a right working; only its result counts fully in the loss."""
        left, _, result = self._rng.choice(self._exercise().work().lines).partition("=")
        return Document(f"{left}=", result + END_OF_TEXT)

    def _attempt(self, exercise: Exercise) -> Working:
        """Right, by a misconception, or guessed, as the recipe's flaws say."""
        if not self._item.flawed:
            return exercise.work()
        flaws, chance = self._recipe.flaws, self._rng.random()
        wrong = exercise.wrong_methods()
        if wrong and chance < flaws.misconception:
            return exercise.work(self._rng.choice(wrong), slip=flaws.slip, rng=self._rng)
        if wrong and chance < flaws.misconception + flaws.guess:
            return Working((), self._guess(exercise, wrong))
        return exercise.work(slip=flaws.slip, rng=self._rng)

    def _guess(self, exercise: Exercise, wrong: list[str]) -> str:
        method = "right" if self._rng.random() < _GUESS_RIGHT else self._rng.choice(wrong)
        return exercise.work(method).answer

    def _fill(self, working: Working) -> Working:
        """Puts filler after the first line: by then the method is chosen, the length is not."""
        filler = self._recipe.filler
        if not working.lines or self._rng.random() >= filler.share:
            return working
        count = 1
        while count < filler.most and self._rng.random() < filler.more:
            count += 1
        lines = [self._rng.choice(filler.phrases) for _ in range(count)]
        return Working((working.lines[0], *lines, *working.lines[1:]), working.answer)

    def _document(self, exercise: Exercise, working: Working) -> Document:
        prompt = self._template.render(exercise.problem)
        if self._ending == "answer_tag":
            body = "\n".join(("", *working.lines))
            return Document(prompt, f"{body}\n</think> <answer>{working.answer}</answer>{END_OF_TEXT}")
        # Without a template the working starts on a new line: bare question-answer concatenation.
        start = "" if prompt.endswith("\n") else "\n"
        return Document(prompt, f"{start}{working.text()}{END_OF_TEXT}")


def _parts(item: MixtureItem) -> list[tuple[str, int]]:
    assert item.set is not None  # MixtureItem has checked it
    parts = SETS[item.set].parts
    if item.families or item.levels:
        families = item.families or tuple(dict.fromkeys(f for f, _ in parts))
        levels = item.levels or tuple(dict.fromkeys(level for _, level in parts))
        parts = grid(families, levels)
    return list(parts)
