"""`slipstream pretrain`: from a recipe to a base model folder in Hugging Face format.

Invariant: the output folder either does not exist, or holds a complete model with the recipe that made it:
everything is written beside it and renamed at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

from common.errors import UserError
from common.recipe import load_toml_model, resolved_toml
from common.tasks.minimath import minimath
from common.tasks.templates import get_template
from learner.pretraining.probe import Sample, accuracy, by_family, probe
from learner.pretraining.recipe import PretrainRecipe
from learner.pretraining.tokenizer import build_tokenizer
from learner.pretraining.trainer import Progress, build_model, train


@dataclass(frozen=True)
class PretrainReport:
    """What the finished model does on the recipe's probe."""

    out: Path
    parameters: int
    pass1: float
    families: dict[str, float]
    mean_tokens: float
    truncated: float


def load_pretrain_recipe(path: Path, overrides: list[str] | None = None) -> PretrainRecipe:
    """Reads and checks a recipe file, with `key=value` overrides.

    Raises:
        UserError: no such file, unknown key, or contradiction.
    """
    return load_toml_model(PretrainRecipe, path, overrides or [])


def pretrain(
    recipe: PretrainRecipe, *, overwrite: bool = False, progress: Progress = lambda step, loss, tokens: None
) -> PretrainReport:
    """Trains, probes and saves a base model.

    Raises:
        UserError: the output folder exists and `overwrite` is false, or it cannot be written.
    """
    _refuse_existing(recipe.out, overwrite)
    torch.set_num_threads(recipe.threads)
    with _staging(recipe.out) as staging:
        tokenizer = build_tokenizer(
            recipe.tokenizer.templates, recipe.tokenizer.strings, recipe.model.context
        )
        model = build_model(recipe, tokenizer)
        train(recipe, model, tokenizer, progress)
        report = _report(recipe, model, run_probe(recipe, model, tokenizer))
        _save(recipe, model, tokenizer, report, staging)
        _swap(staging, recipe.out)
    return report


def run_probe(recipe: PretrainRecipe, model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer) -> list[Sample]:
    """Samples the recipe's probe set at temperature 1."""
    section = recipe.probe
    return probe(
        model,
        tokenizer,
        minimath(section.set, limit=section.questions),
        get_template(section.template),
        samples=section.samples,
        max_tokens=section.max_tokens,
        seed=recipe.seed,
    )


def _report(recipe: PretrainRecipe, model: Qwen2ForCausalLM, samples: list[Sample]) -> PretrainReport:
    return PretrainReport(
        out=recipe.out,
        parameters=model.num_parameters(),
        pass1=accuracy(samples),
        families=by_family(samples),
        mean_tokens=sum(s.tokens for s in samples) / len(samples),
        truncated=sum(not s.finished for s in samples) / len(samples),
    )


def _refuse_existing(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise UserError(f"'{out}' exists; choose another folder or pass --overwrite", setting="out")


@contextlib.contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A folder beside the output, made before training so that an unwritable place is noticed at once."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise UserError(f"cannot write to '{out.parent}': {error.strerror}", setting="out") from error
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _save(
    recipe: PretrainRecipe,
    model: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    report: PretrainReport,
    staging: Path,
) -> None:
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    (staging / "pretrain.toml").write_text(resolved_toml(recipe), encoding="utf-8")
    (staging / "probe.json").write_text(_probe_json(recipe, report), encoding="utf-8")
    _make_readable(staging)


def _make_readable(folder: Path) -> None:
    """Temporary folders and safetensors files start private to their owner."""
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)


def _swap(staging: Path, out: Path) -> None:
    """Puts the finished folder in place; an old one is set aside first, so that there is never a mixture."""
    if not out.exists():
        os.rename(staging, out)
        return
    old = out.with_name(f".{out.name}-old-{os.getpid()}")
    os.rename(out, old)
    os.rename(staging, out)
    shutil.rmtree(old)


def _probe_json(recipe: PretrainRecipe, report: PretrainReport) -> str:
    figures = {
        "set": recipe.probe.set,
        "template": recipe.probe.template,
        "parameters": report.parameters,
        "pass1": round(report.pass1, 4),
        "families": {family: round(value, 4) for family, value in report.families.items()},
        "mean_tokens": round(report.mean_tokens, 2),
        "truncated": round(report.truncated, 4),
    }
    return json.dumps(figures, indent=2) + "\n"
