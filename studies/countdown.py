"""The linked blog's task: Countdown with a shaped reward (0, 0.1 for the form, 1 for the target).

The blog saw length fall until the reward for the form was learnt, then rise while the task itself was. The
miniature's base model is made here, because MiniMath's corpus has no Countdown: its text tries combinations at
random and answers with one that fits, or guesses, or never comes to an answer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from common.recipe import find_recipe
from common.tasks.countdown import FORMAT_REWARD, countdown, reward
from studies.curves import claim, run_curve, size, spread, units_of
from studies.figures import band, grid
from studies.study import Setting, Study, Table, Unit
from studies.training import Problem, Run
from studies.verdict import Expectation, Row, mean, per_seed

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel

    from learner.pretraining.corpus import Document
    from learner.pretraining.packing import Batch

NUMBERS, LARGEST = 2, 9
_TRIES = 4
_ONE_TOKEN = ("<answer>", "</answer>", "Using ", " once each, make ")
_UNFINISHED, _GUESS = 0.35, 0.35  # shares of the pretraining text that never answer, that guess
_OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
RECIPE = "countdown"


def lengths(rows: Sequence[Row]) -> tuple[float, float, float]:
    """(start, lowest, end) of the mean response length, smoothed over a tenth of the run."""
    curve = [row["length"] for row in sorted(rows, key=lambda row: row["step"]) if row["kind"] == "train"]
    width = max(1, len(curve) // 10)
    smooth = [mean(curve[i : i + width]) for i in range(len(curve) - width + 1)]
    if not smooth:
        raise ValueError("there is no curve")
    return smooth[0], min(smooth), smooth[-1]


def _rewards(rows: Sequence[Row]) -> tuple[float, float]:
    curve = [row["reward"] for row in sorted(rows, key=lambda row: row["step"]) if row["kind"] == "train"]
    width = max(1, len(curve) // 10)
    return mean(curve[:width]), mean(curve[-width:])


def _part(rows: Sequence[Row], of: Callable[[Sequence[Row]], tuple[float, ...]], index: int) -> float:
    return of(rows)[index]


class Countdown(Study):
    """See the module."""

    name = "countdown"
    shows = "the Countdown run of the linked analysis"
    paper = (
        "Response length first falls, while the model learns the form that earns 0.1, and rises afterwards, while "
        "it learns to search; the rise is the optimisation of a rule-based reward and no emergence of reflection."
    )
    miniature = (
        "Two numbers up to 9, GRPO as in the linked run, 120 steps; a base model whose text tries combinations at random and often "
        "comes to no answer. Learning rate 1e-3: of 3e-4 and 1e-3 the one with which the reward of GRPO rose further "
        "on a base model of another seed (0.32 to 0.52, 0.36 to 0.65 in 40 steps)."
    )
    expectations = (
        Expectation("reward, end - start", claim(lambda rows: _rewards(rows)[1] - _rewards(rows)[0]), 0.1),
        Expectation(
            "response length, lowest / start",
            claim(lambda rows: lengths(rows)[1] / lengths(rows)[0]),
            0.9,
            "at most",
        ),
        Expectation(
            "response length, end / lowest", claim(lambda rows: lengths(rows)[2] / lengths(rows)[1]), 1.1
        ),
    )

    remark = (
        "The seeds differ. In two of them length falls within ten steps, from 20 and 22 tokens to 13 and 14, "
        "while the form is learnt, and stays there while reward rises to 0.75: earlier than the check looks, "
        "whose start is the mean of the first twelve steps. In the third it rises to 30 tokens twice, without any "
        "gain in reward, and comes back to 15. Nowhere does it end above its start. Probable reason (not measured): with "
        "two numbers and three operations the policy learns to pick the right combination at once and needs no "
        "search. Tried: a first run was of Dr. GRPO, which the linked analysis did not use; length fell to 13.5 "
        "tokens in all its seeds, and the three claims measured 0.226, 0.925 and 1.02."
    )

    def units(self, setting: Setting) -> list[Unit]:
        return units_of(setting, [{}])

    def run(self, unit: Unit, setting: Setting) -> list[Row]:
        return run_curve(
            unit,
            setting,
            lambda: _mini_run(unit.arguments["seed"], setting),
            recipe=RECIPE,
            settings={"data.train": _full_set(setting)} if setting.full else {},
        )

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        cells: list[tuple[str, ...]] = [("", "start", "lowest", "end")]
        parts = [spread(per_seed(rows, partial(_part, of=lengths, index=index)), 1) for index in range(3)]
        cells.append(("response length", *parts))
        rewards = [spread(per_seed(rows, partial(_part, of=_rewards, index=index))) for index in range(2)]
        cells.append(("reward", rewards[0], "", rewards[1]))
        return [Table("Mean (range) over seeds", cells)]

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        left, right = grid(figure, 1, 2)
        train = [row for row in rows if row["kind"] == "train"]
        band(left, train, "step", "reward", smooth=7)
        left.axhline(FORMAT_REWARD, color="0.5", linestyle=":", label="reward of the form")
        left.legend(frameon=False, fontsize="small")
        band(right, train, "step", "length", smooth=7)
        left.set(title="shaped reward", xlabel="step", ylabel="reward")
        right.set(title="response length", xlabel="step", ylabel="tokens")


def documents(rng: random.Random) -> Iterator[Document]:
    """Endless pretraining text."""
    from learner.pretraining.corpus import Document
    from learner.pretraining.tokenizer import END_OF_TEXT

    while True:
        seed = rng.randrange(1 << 30)
        question = countdown(1, seed=seed, numbers=NUMBERS, largest=LARGEST)[0]
        yield Document(question["problem"], _response(question, rng) + END_OF_TEXT)


def _response(question: dict, rng: random.Random) -> str:
    """Tries, then the try that fits, or a guess, or nothing."""
    tried = []
    for _ in range(rng.randint(1, _TRIES)):
        a, b = rng.sample(question["numbers"], NUMBERS)
        sign = rng.choice(list(_OPERATIONS))
        value = _OPERATIONS[sign](a, b)
        tried.append(f"{a}{sign}{b}={value}")
        if str(value) == question["answer"]:
            break
    found = tried[-1].endswith(f"={question['answer']}")
    chance = rng.random()
    if chance < _UNFINISHED:
        return "\n" + "\n".join([*tried, *(rng.choice(tried) for _ in range(3))])
    if chance < _UNFINISHED + _GUESS or not found:
        return "\n" + "\n".join([*tried[:1], f"<answer>{rng.choice(tried).partition('=')[0]}</answer>"])
    return "\n" + "\n".join([*tried, f"<answer>{tried[-1].partition('=')[0]}</answer>"])


def _base_model(seed: int, setting: Setting) -> Path:
    """Pretrain the base model of a seed, once."""
    folder = setting.out / f"base-seed-{seed}"
    if (folder / "config.json").exists():
        return folder
    from learner.pretrain import load_pretrain_recipe
    from learner.pretraining.packing import batches
    from learner.pretraining.tokenizer import build_tokenizer
    from learner.pretraining.trainer import build_model

    recipe = load_pretrain_recipe(find_recipe("zoo-qwen-math"), [f"seed={seed}"])
    tokenizer = build_tokenizer((), _ONE_TOKEN, recipe.model.context)
    model = build_model(recipe, tokenizer)
    stream = batches(
        documents(random.Random(f"countdown/{seed}")),
        tokenizer,
        rows=recipe.train.rows,
        row_tokens=recipe.train.row_tokens,
        prompt_weight=recipe.train.prompt_weight,
    )
    _fit(model, stream, steps=size(setting, 400, 3), peak=recipe.train.lr)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _fit(model: PreTrainedModel, stream: Iterator[Batch], *, steps: int, peak: float) -> None:
    """Next-token prediction with the schedule of `slipstream pretrain`."""
    import torch
    from torch.nn.functional import cross_entropy

    from learner.schedule import lr_factor

    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    factor = lr_factor("cosine", steps // 10, steps)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = peak * factor(step)
        batch = next(stream)
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        losses = cross_entropy(
            logits[:, :-1].flatten(0, 1), batch.input_ids[:, 1:].flatten(), reduction="none"
        )
        weights = batch.weights[:, 1:].flatten()
        ((losses * weights).sum() / weights.sum().clamp(min=1.0)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _problems(count: int, seed: int) -> list[Problem]:
    rows = countdown(count, seed=seed, numbers=NUMBERS, largest=LARGEST)
    return [Problem(row["problem"], row) for row in rows]


def _full_set(setting: Setting) -> str:
    """The questions of the full-size run, as a file that the recipe reads."""
    path = setting.out / "countdown.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in countdown(20_000, numbers=3, largest=99)))
    return str(path)


def _mini_run(seed: int, setting: Setting) -> Run:
    return Run(
        model=str(_base_model(seed, setting)),
        problems=_problems(size(setting, 500, 8), seed),
        held_out=_problems(size(setting, 60, 4), 1000),
        algorithm="grpo",  # the linked run's
        template="no",
        steps=size(setting, 120, 2),
        questions=size(setting, 32, 4),
        group=size(setting, 8, 2),
        max_tokens=size(setting, 64, 8),
        lr=1e-3,
        eval_every=40,
        seed=seed,
        reward=reward,
    )
