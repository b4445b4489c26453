"""`slipstream eval`: a model or a run's newest checkpoint on the benchmarks.

Invariant: an evaluation is a function of its settings: the same settings name the same folder, where finished
questions are kept and not answered again. Everything wrong with the request is said before the engine starts.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from common.errors import RunFailedError, UserError
from common.run_files import CHECKPOINTS_FOLDER, EXPORT_FOLDER
from common.tasks.sets import BENCHMARKS

if TYPE_CHECKING:
    from common.verifier.grade import Level

PAPER_CONTEXT, PAPER_TOKENS = 4096, 3000
EVAL_ROOT = Path("runs") / "eval"


def evaluate(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Folder or hub id of the model.")
    ] = None,
    run: Annotated[
        str | None,
        typer.Option("--run", metavar="RUN", help="Newest exported checkpoint of this run instead."),
    ] = None,
    benchmarks: Annotated[
        list[str] | None,
        typer.Option(
            "--benchmark",
            "-b",
            metavar="SET",
            help="Question set: a name, a file or a hub id. Repeatable. Default: the run's `eval.sets`, else the "
            "paper's five.",
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help="Prompt template, or a text with {question}. Default: the run's, else qwen_math."),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=0, help="Sampled responses per question, for pass@k; 0 is one greedy response.")
    ] = 0,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the sampled responses.")] = 1.0,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Budget of a response, in tokens. Default: the run's, else 3000, or half of a smaller context.",
        ),
    ] = None,
    max_context: Annotated[
        int | None,
        typer.Option(
            help="Tokens of prompt + response. Default: the run's, else 4096, or the model's context if smaller."
        ),
    ] = None,
    level: Annotated[str, typer.Option(help="Verifier: `fast`, or `full` as the paper evaluates.")] = "full",
    dtype: Annotated[
        str | None, typer.Option(help="`bfloat16` or `float32`. Default: the run's, else bfloat16.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions per set at most.")] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder searched for named sets before the hub. Default: the run's `data.data_dir`."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling and of the confidence intervals.")] = 0,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences decoded at one time.")] = 256,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="GPUs per engine.")] = 1,
    kv_cache_mb: Annotated[
        int | None, typer.Option(min=1, help="KV cache in MiB. Default: what vLLM finds.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option(help="Run code that comes with the model, as `model.trust_remote_code` of a run.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the answers. Default: runs/eval/MODEL-DIGEST.")
    ] = None,
    mlflow: Annotated[bool, typer.Option(help="Also log the table to MLflow.")] = True,
    mlflow_uri: Annotated[
        str | None, typer.Option(help="MLflow server. Default: the SQLite store beside the runs.")
    ] = None,
) -> None:
    """Evaluate a model on question sets: accuracy with confidence intervals, pass@k, lengths, shares. Resumable."""
    from actors.offline_eval import EvalPlan, plan_questions
    from common.tasks.templates import get_template
    from common.verifier.grade import check_options
    from deploy.eval_screen import run_with_progress, show
    from deploy.eval_tracking import log_report

    check_options(level, "boxed")
    usual = _usual(model, run)
    path, chosen = usual.model, template or usual.template
    trusted = trust_remote_code or usual.trust_remote_code
    get_template(chosen, model=path, trust_remote_code=trusted)
    context, budget = _budget(usual, max_context, max_tokens)
    plan = EvalPlan(
        model=path,
        fingerprint=_fingerprint(path),
        sets=tuple(benchmarks or usual.sets),
        template=chosen,
        samples=samples,
        temperature=temperature,
        max_tokens=budget,
        max_context=context,
        level=cast("Level", level),
        dtype=dtype or usual.dtype,
        limit=limit,
        seed=seed,
        sequences=sequences,
        tensor_parallel=tensor_parallel,
        kv_cache_mb=kv_cache_mb,
        trust_remote_code=trusted,
    )
    questions = plan_questions(plan, data_dir or usual.data_dir)
    folder = out or EVAL_ROOT / f"{_plain_name(path)}-{plan.digest}"
    with _engine_may_die():
        report = run_with_progress(plan, questions, folder)
    show(report, folder)
    if mlflow:
        log_report(report, plan, folder, uri=mlflow_uri)


@dataclass(frozen=True)
class _Usual:
    """The model, and what holds where the caller gives nothing else."""

    model: str
    template: str = "qwen_math"
    sets: tuple[str, ...] = BENCHMARKS
    dtype: str = "bfloat16"
    max_tokens: int | None = None
    max_context: int | None = None
    data_dir: Path | None = None
    trust_remote_code: bool = False


def _usual(model: str | None, run: str | None) -> _Usual:
    if (model is None) == (run is None):
        raise UserError("give either a MODEL or --run RUN.")
    if model is not None:
        return _Usual(model)
    from deploy.folder import find_folder, newest_model, read_recipe

    folder = find_folder(str(run))
    recipe, newest = read_recipe(folder), newest_model(folder)
    if newest is None:
        raise UserError(f"the run in '{folder}' has no exported checkpoint yet.", setting="--run")
    return _Usual(
        model=str(newest),
        template=recipe.data.template,
        sets=recipe.eval.sets or BENCHMARKS,
        dtype=recipe.model.dtype,
        max_tokens=recipe.eval.max_tokens or recipe.rollout.max_tokens,
        max_context=recipe.model.max_context,
        data_dir=recipe.data.data_dir,
        trust_remote_code=recipe.model.trust_remote_code,
    )


@contextlib.contextmanager
def _engine_may_die() -> Iterator[None]:
    """An engine that dies under the questions, alone or with what waited for it, as one sentence."""
    from actors.engine import EngineLostError

    try:
        yield
    except (EngineLostError, ExceptionGroup) as error:
        while isinstance(error, ExceptionGroup):
            lost = error.subgroup(EngineLostError)
            if lost is None:
                raise
            error = lost.exceptions[0]
        cause = str(error).replace('model.dtype = "float32"', "--dtype float32")
        raise RunFailedError(f"{cause}; the same command goes on from the answers that are there.") from None


def _budget(usual: _Usual, max_context: int | None, max_tokens: int | None) -> tuple[int, int]:
    """Tokens of prompt + response, and of a response; also checks that the model exists and has a tokenizer."""
    from common.model_files import read_shape, require_tokenizer

    largest = read_shape(usual.model).context
    require_tokenizer(usual.model)
    context = max_context or min(usual.max_context or PAPER_CONTEXT, largest)
    if context > largest:
        raise UserError(
            f"{context} tokens are more than the model's context of {largest}.", setting="--max-context"
        )
    default = usual.max_tokens or PAPER_TOKENS
    budget = max_tokens or (default if default < context else max(1, context // 2))
    if budget >= context:
        raise UserError(
            f"{budget} tokens leave no room for a prompt within the context of {context}.",
            setting="--max-tokens",
        )
    return context, budget


def _fingerprint(path: str) -> str:
    """What tells two states of a local model folder apart: its weight files, their sizes and times."""
    folder = Path(path)
    if not folder.is_dir():
        return "hub"
    files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin"))
    return ";".join(f"{f.name}:{f.stat().st_size}:{f.stat().st_mtime_ns}" for f in files)


def _plain_name(path: str) -> str:
    """A folder name for a model: of a checkpoint's export, the run and the step."""
    parts = [part for part in Path(path).parts if part not in (EXPORT_FOLDER, CHECKPOINTS_FOLDER, os.sep)]
    name = "-".join(parts[-2:])
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
