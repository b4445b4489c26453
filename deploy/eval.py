"""`slipstream eval`: a model or a run's newest checkpoint on the benchmarks.

Invariant: an evaluation is a function of its settings: the same settings name the same folder, where finished
questions are kept and not answered again. Everything wrong with the request is said before the engine starts.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from common.errors import UserError

PAPER_BENCHMARKS = ("aime", "amc", "math500", "minerva", "olympiad_bench")
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
            help="Question set: a name, a file or a hub id. Repeatable. Default: the paper's five.",
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
    max_tokens: Annotated[int, typer.Option(min=1, help="Budget of a response, in tokens.")] = 3000,
    max_context: Annotated[
        int | None,
        typer.Option(help="Tokens of prompt + response. Default: 4096, or the model's context if smaller."),
    ] = None,
    level: Annotated[str, typer.Option(help="Verifier: `fast`, or `full` as the paper evaluates.")] = "full",
    dtype: Annotated[str, typer.Option(help="`bfloat16` or `float32`.")] = "bfloat16",
    limit: Annotated[int | None, typer.Option(min=1, help="Questions per set at most.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder searched for named sets before the hub.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling and of the confidence intervals.")] = 0,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences decoded at one time.")] = 256,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="GPUs per engine.")] = 1,
    kv_cache_mb: Annotated[
        int | None, typer.Option(min=1, help="KV cache in MiB. Default: what vLLM finds.")
    ] = None,
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
    path, run_template = _model_of(model, run)
    chosen = template or run_template or "qwen_math"
    get_template(chosen, model=path)
    plan = EvalPlan(
        model=path,
        fingerprint=_fingerprint(path),
        sets=tuple(benchmarks or PAPER_BENCHMARKS),
        template=chosen,
        samples=samples,
        temperature=temperature,
        max_tokens=max_tokens,
        max_context=_context(path, max_context, max_tokens),
        level=level,
        dtype=dtype,
        limit=limit,
        seed=seed,
        sequences=sequences,
        tensor_parallel=tensor_parallel,
        kv_cache_mb=kv_cache_mb,
    )
    questions = plan_questions(plan, data_dir)
    folder = out or EVAL_ROOT / f"{_plain_name(path)}-{plan.digest}"
    report = run_with_progress(plan, questions, folder)
    show(report, folder)
    if mlflow:
        log_report(report, plan, folder, uri=mlflow_uri)


def _model_of(model: str | None, run: str | None) -> tuple[str, str | None]:
    """The model's path and the template that belongs to it."""
    if (model is None) == (run is None):
        raise UserError("give either a MODEL or --run RUN.")
    if model is not None:
        return model, None
    from deploy.folder import find_folder, read_recipe

    folder = find_folder(str(run))
    return str(newest_export(folder)), read_recipe(folder).data.template


def newest_export(folder: Path) -> Path:
    """The newest checkpoint of a run in Hugging Face format.

    Raises:
        UserError: the run has none yet.
    """
    checkpoints = folder / "checkpoints"
    try:
        name = json.loads((checkpoints / "latest.json").read_text(encoding="utf-8"))["folder"]
        export = checkpoints / name / "hf"
        if (export / "config.json").is_file():
            return export
    except (OSError, ValueError, KeyError):
        pass
    raise UserError(f"the run in '{folder}' has no exported checkpoint yet.", setting="--run")


def _context(path: str, wanted: int | None, max_tokens: int) -> int:
    """Tokens of prompt + response; also checks that the model exists and has a tokenizer."""
    from common.model_files import read_shape, require_tokenizer

    largest = read_shape(path).context
    require_tokenizer(path)
    context = wanted or min(4096, largest)
    if context > largest:
        raise UserError(
            f"{context} tokens are more than the model's context of {largest}.", setting="--max-context"
        )
    if max_tokens >= context:
        raise UserError(
            f"{max_tokens} tokens leave no room for a prompt within the context of {context}.",
            setting="--max-tokens",
        )
    return context


def _fingerprint(path: str) -> str:
    """What tells two states of a local model folder apart: its weight files, their sizes and times."""
    folder = Path(path)
    if not folder.is_dir():
        return "hub"
    files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin"))
    return ";".join(f"{f.name}:{f.stat().st_size}:{f.stat().st_mtime_ns}" for f in files)


def _plain_name(path: str) -> str:
    """A folder name for a model: of a checkpoint's export, the run and the step."""
    parts = [part for part in Path(path).parts if part not in ("hf", "checkpoints", os.sep)]
    name = "-".join(parts[-2:])
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
