"""The base-model zoo: small models whose pretraining text is the only difference between them.

Invariant: a model in the zoo was made by the recipe that is in `recipes/` now, with its seed; if the recipe has
changed, the model is made again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from common.recipe import find_recipe, resolved_toml
from studies.study import Budget, Setting

# name -> the paper's model that it stands for.
HUB = {
    "qwen-math": "Qwen/Qwen2.5-Math-1.5B",
    "qwen-math-r1": "Qwen/Qwen2.5-Math-1.5B",
    "llama": "meta-llama/Llama-3.2-3B",
    "chat": "Qwen/Qwen2.5-Math-1.5B-Instruct",
    "finemath": "HuggingFaceTB/FineMath-Llama-3B",
    "numina": "lkevinzc/Llama-3.2-3B-NuminaQA",
    "filler": "Qwen/Qwen2.5-1.5B",
}
# Models that continue from another one (paper, section 3.4).
PARENTS = {"finemath": "llama", "numina": "finemath"}
_SECONDS = (
    "train.steps=4",
    "train.rows=4",
    "model.hidden=32",
    "model.heads=2",
    "model.ffn=64",
    "model.layers=1",
    "probe.questions=4",
    "probe.samples=1",
    "probe.max_tokens=8",
)


def folder(name: str, seed: int, setting: Setting) -> Path:
    """Where a model of the zoo is, or will be."""
    tag = "-seconds" if setting.budget is Budget.SECONDS else ""
    return setting.zoo / f"{name}-seed-{seed}{tag}"


def where(name: str, seed: int, setting: Setting) -> str:
    """Folder of the small model, or hub id of the paper's model."""
    return HUB[name] if setting.full else str(folder(name, seed, setting))


def generations(models: Iterable[tuple[str, int]]) -> list[list[tuple[str, int]]]:
    """The models with all that they continue from, parents before children; a generation may be made at once."""
    levels: list[list[tuple[str, int]]] = []
    for name, seed in models:
        for level, ancestor in enumerate(_line(name)):
            levels += [[]] if level == len(levels) else []
            if (ancestor, seed) not in levels[level]:
                levels[level].append((ancestor, seed))
    return levels


def _line(name: str) -> Sequence[str]:
    """A model's ancestors, oldest first, and itself."""
    return [*_line(PARENTS[name]), name] if name in PARENTS else [name]


def is_made(name: str, seed: int, setting: Setting) -> bool:
    """The model is there and its recipe is today's."""
    made_by = folder(name, seed, setting) / "pretrain.toml"
    return made_by.exists() and made_by.read_text(encoding="utf-8") == resolved_toml(
        _recipe(name, seed, setting)
    )


def make(name: str, seed: int, setting: Setting) -> None:
    """Pretrain a model; its parent must be there."""
    from learner.pretrain import pretrain

    pretrain(_recipe(name, seed, setting), overwrite=True)


def _recipe(name: str, seed: int, setting: Setting):
    from learner.pretrain import load_pretrain_recipe

    overrides = [f"seed={seed}", f'out="{folder(name, seed, setting)}"', f'name="{name}"']
    if name in PARENTS:
        overrides.append(f'init_from="{folder(PARENTS[name], seed, setting)}"')
    if setting.budget is Budget.SECONDS:
        overrides += _SECONDS
    return load_pretrain_recipe(find_recipe(f"zoo-{name}"), overrides)
