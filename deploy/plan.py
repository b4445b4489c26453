"""`slipstream plan`: how many actors for a learner, and what a run would take, before anything is bought or started.

Invariant: nothing is started and nothing written; every rate that a figure rests on is printed with its source.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.check import RecipeArgument, SetOption

ASSUMED = (
    "assumed rates of A100s, not measured on any GPU here; --from RUN takes those of a recorded run, of this machine for "
    "example. Evaluations are left out"
)

if TYPE_CHECKING:
    from common.model_files import ModelShape
    from common.recipe import Recipe
    from deploy.planning.assumed import Given
    from deploy.planning.calibrate import Calibration
    from deploy.planning.rates import Rates
    from deploy.planning.recommend import RatesOf, Split
    from deploy.planning.workload import LogNormal, Recorded, Workload

DEFAULT_GPUS = (8, 64, 512)
ACTOR_COUNTS = (1, 2, 3, 4, 6, 8)
A100_BYTES = 80 * 2**30
DEFAULT_PROMPT_TOKENS = 150.0
FILE_WIDTH = 130  # of what goes to a file
Rows = list[tuple[str, str]]


def plan(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    recorded: Annotated[
        list[str] | None,
        typer.Option(
            "--from",
            metavar="RUN",
            help="Take rates, lengths and the filtered share from this run (folder, or name below ./runs) instead of "
            "assuming them. Best with `broker.record = true` and 15 steps or more. Repeatable: a synchronous and an "
            "asynchronous run of the same machine also tell how much learner and actors slow each other down.",
        ),
    ] = None,
    gpus: Annotated[
        list[int] | None,
        typer.Option(
            min=2, help="A100s to share out between learner and actors. Repeatable; default 8, 64, 512."
        ),
    ] = None,
    actor_rate: Annotated[
        float | None,
        typer.Option(
            metavar="TOKENS/S", help="What one actor generates with `actor.max_sequences` sequences."
        ),
    ] = None,
    decode_ms: Annotated[
        float | None, typer.Option(metavar="MS", help="Fastest decode step of an engine, with one sequence.")
    ] = None,
    learner_rate: Annotated[
        float | None,
        typer.Option(
            metavar="TOKENS/S", help="What one learner rank trains, prompts and responses together."
        ),
    ] = None,
    update_seconds: Annotated[
        float | None,
        typer.Option(
            metavar="S", help="One optimizer step beside its tokens: gradients reduced, weights gathered."
        ),
    ] = None,
    push_seconds: Annotated[
        float | None, typer.Option(metavar="S", help="From a commit until an actor holds the new weights.")
    ] = None,
    mean_length: Annotated[
        float | None,
        typer.Option(metavar="TOKENS", help="Mean response; default a fifth of `rollout.max_tokens`."),
    ] = None,
    prompt_tokens: Annotated[
        float | None, typer.Option(metavar="TOKENS", help="Mean prompt, template included; default 150.")
    ] = None,
    filtered: Annotated[
        float | None,
        typer.Option(min=0, max=0.99, help="Share of groups whose rewards are all equal; default 0."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the simulated lengths.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Predict step time, idle shares and staleness of a recipe, and recommend how many actors feed its learner.

    A discrete-event simulation: engines that batch continuously, a learner that takes one batch ahead, and the
    broker's own ledger between them, so that `batch.max_staleness`, `batch.zero_variance` and evaluations act as
    in a run. Two uses:

    * `slipstream plan paper-7b` shares out 8, 64 and 512 A100s. Rates are **assumed** and printed with their
      source; replace what you know: `--actor-rate 2500 --learner-rate 3000`.

    * `slipstream plan demo --from runs/demo` takes the rates of a recorded run and predicts the recipe (with any
      `--set`) on the same machines, for 1 to 8 actors: what would `--set batch.max_staleness=4` change?

    How far to trust it: docs/planning.md has predictions beside real runs.
    """
    from common.errors import UserError
    from common.recipe import load_recipe
    from deploy.planning.assumed import Given

    given = Given(actor_rate, decode_ms, learner_rate, update_seconds, push_seconds)
    for name, value in {
        **given.replaced(),
        "mean_length": mean_length,
        "prompt_tokens": prompt_tokens,
    }.items():
        if value is not None and not value > 0:
            raise UserError(f"must be more than 0, not {value:g}.", setting="--" + name.replace("_", "-"))
    if mean_length is not None and recorded:
        raise UserError(
            "a recorded run brings its own lengths; give one of the two.", setting="--mean-length"
        )
    loaded = load_recipe(recipe, overrides or ())
    if not recorded:
        found = _assumed(loaded, given, gpus or DEFAULT_GPUS, mean_length, prompt_tokens, filtered, seed)
    else:
        found = _calibrated(loaded, given, recorded, gpus, prompt_tokens, filtered, seed)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _print(loaded, found)


# --- with the rates of a recorded run -------------------------------------------------------------------------


def _calibrated(
    recipe: Recipe,
    given: Given,
    runs: Sequence[str],
    gpus: Sequence[int] | None,
    prompt_tokens: float | None,
    filtered: float | None,
    seed: int,
) -> dict[str, Any]:
    from common.errors import UserError
    from deploy.planning.calibrate import calibrate
    from deploy.planning.recommend import actors_for_learner, best

    if gpus:
        raise UserError("a recorded run says nothing about A100s: give --gpus or --from.", setting="--gpus")
    calibration = calibrate(*runs)
    workload = _with_workload(recipe, calibration, prompt_tokens, filtered)
    rates = _with_given(recipe, calibration, given)
    counts = sorted({*ACTOR_COUNTS, recipe.actor.count})
    splits = actors_for_learner(recipe, rates, workload, counts, seed)
    return {
        "recipe": recipe.run.name,
        "calibrated": True,
        "rates": _rates_of_runs(recipe, rates, runs, calibration),
        "workload": _describe(workload),
        "rows": [_row(split, recipe, f"{split.actors} actors") for split in splits],
        "recommended": best(splits).actors,
        "notes": [
            *calibration.notes,
            "each actor is taken to have a machine, or a core, for itself, as fast as the recorded one's",
        ],
    }


def _with_workload(
    recipe: Recipe, calibration: Calibration, prompt_tokens: float | None, filtered: float | None
) -> Workload:
    from dataclasses import replace

    known = calibration.workload
    return replace(
        known,
        lengths=replace(known.lengths, longest=recipe.rollout.max_tokens),
        prompt_tokens=prompt_tokens or known.prompt_tokens,
        filtered_share=known.filtered_share if filtered is None else filtered,
        eval_sequences=known.eval_sequences if recipe.eval.sets else 0,
    )


def _with_given(recipe: Recipe, calibration: Calibration, given: Given) -> Any:
    """The run's rates, scaled to the recipe's ranks, with what the caller knows better."""
    from dataclasses import replace

    from common.errors import UserError
    from deploy.planning.rates import sequence_seconds

    rates = calibration.rates.with_ranks(recipe.learner.ranks, of=calibration.recipe.learner.ranks)
    if given.decode_ms is not None:
        rates = replace(rates, decode_s=given.decode_ms / 1e3)
    if given.actor_rate is not None:
        try:
            sequence_s = sequence_seconds(given.actor_rate, recipe.actor.max_sequences, rates.decode_s)
        except ValueError as error:
            raise UserError(f"{error}.", setting="--actor-rate") from None
        rates = replace(rates, sequence_s=sequence_s)
    if given.learner_rate is not None:
        rates = replace(rates, train_token_s=1 / (given.learner_rate * recipe.learner.ranks))
    if given.update_seconds is not None:
        rates = replace(rates, train_fixed_s=given.update_seconds * recipe.batch.optimizer_steps)
    if given.push_seconds is not None:
        rates = replace(rates, push_s=given.push_seconds)
    return rates


def _rates_of_runs(recipe: Recipe, rates: Any, runs: Sequence[str], calibration: Calibration) -> Rows:
    slots, names = recipe.actor.max_sequences, " and ".join(f"'{run}'" for run in runs)
    rows = [
        (f"actor {rates.actor_rate(slots):,.0f} tokens/s at {slots} sequences", f"fitted to {names}"),
        (f"decode step {1e3 * rates.decode_s:.2f} ms + {1e3 * rates.sequence_s:.3f} ms per sequence", "same"),
        (
            f"learner {rates.learner_rate:,.0f} tokens/s + {rates.train_fixed_s:.3f} s per step",
            f"read from {names}",
        ),
        (f"push {rates.push_s:.3f} s, generation stopped {rates.stop_s:.3f} s", "same"),
    ]
    if len(runs) > 1:
        slowed = f"learner {rates.train_contention:.2f}, engines {rates.decode_contention:.2f} times slower"
        rows.append((f"{slowed} while both compute", f"fitted to {names}"))
    for run, recording in zip(runs, calibration.runs, strict=True):
        known = recording.measured
        text = f"step {known.step_s:.2f} s, learner idle {known.learner_idle:.0%}, staleness {known.staleness_mean:.2f}"
        rows.append((f"'{run}': {text}", "measured"))
    return rows


# --- with assumed rates ---------------------------------------------------------------------------------------


def _assumed(
    recipe: Recipe,
    given: Given,
    gpus: Sequence[int],
    mean_length: float | None,
    prompt_tokens: float | None,
    filtered: float | None,
    seed: int,
) -> dict[str, Any]:
    from deploy.planning.assumed import sources
    from deploy.planning.workload import DEFAULT_MEAN_SHARE, LogNormal, Workload

    shape = _shape(recipe)
    mean = mean_length or DEFAULT_MEAN_SHARE * recipe.rollout.max_tokens
    lengths = LogNormal(mean, recipe.rollout.max_tokens)
    workload = Workload(lengths, prompt_tokens or DEFAULT_PROMPT_TOKENS, filtered or 0.0)
    rows, notes = _share_out(recipe, shape, given, workload, gpus, seed)
    given_rows = [
        (f"{name.replace('_', '-')} {value:g}", "given") for name, value in given.replaced().items()
    ]
    return {
        "recipe": recipe.run.name,
        "calibrated": False,
        "rates": [*sources(shape.parameters, recipe.actor.max_sequences, given), *given_rows],
        "workload": _describe(workload),
        "rows": rows,
        "recommended": rows[0]["actors"] if rows else None,
        "notes": list(dict.fromkeys([ASSUMED, *notes])),
    }


def _share_out(
    recipe: Recipe, shape: ModelShape, given: Given, workload: Workload, gpus: Sequence[int], seed: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """The best split of each number of A100s, and what is to be said about them."""
    from deploy.planning.recommend import best_of_gpus

    fewest = _fewest_ranks(recipe, shape)
    rows, notes = [], []
    for count in gpus:
        rates_of = _rates_of_a100s(recipe, shape, given, count)
        split = best_of_gpus(recipe, rates_of, workload, count, fewest_ranks=fewest, seed=seed)
        if split is None:
            notes.append(
                f"{count} A100s are too few: {fewest} learner ranks hold the model, and an actor needs its own"
            )
            continue
        rows.append(_row(split, recipe, f"{count} A100s"))
        notes += _too_little_memory(recipe, shape, split)
    if rows and rows[-1]["gpus"] < max(gpus):
        notes.append(
            "GPUs are left over: one step has too few responses for more, and its longest response bounds it; raise "
            "batch.questions_per_step, or batch.max_staleness where the longest response is what is waited for"
        )
    return rows, notes


def _rates_of_a100s(recipe: Recipe, shape: ModelShape, given: Given, gpus: int) -> RatesOf:
    from deploy.planning.assumed import a100_rates

    def rates_of(ranks: int) -> Rates:
        return a100_rates(
            shape.parameters,
            slots=recipe.actor.max_sequences,
            tensor_parallel=recipe.actor.tensor_parallel,
            ranks=ranks,
            updates=recipe.batch.optimizer_steps * recipe.algorithm.epochs,
            gpus=gpus,
            given=given,
        )

    return rates_of


def _shape(recipe: Recipe) -> ModelShape:
    from common.errors import UserError
    from common.model_files import KNOWN_SHAPES, read_shape

    if recipe.model.path in KNOWN_SHAPES:
        return KNOWN_SHAPES[recipe.model.path]
    try:
        return read_shape(recipe.model.path)
    except UserError as error:
        raise UserError(f"the model's size is needed for a plan: {error}", setting="model.path") from None


def _fewest_ranks(recipe: Recipe, shape: ModelShape) -> int:
    """Ranks that A100s of 80 GB need for the learner's state, with snapshots in host memory."""
    weights = recipe.weights.model_copy(update={"route": "gloo"})
    frugal = recipe.model_copy(update={"weights": weights})
    return next((ranks for ranks in range(1, 4096) if _rank_bytes(frugal, shape, ranks) <= A100_BYTES), 4096)


def _rank_bytes(recipe: Recipe, shape: ModelShape, ranks: int) -> float:
    from deploy.memory import learner_memory

    learner = recipe.learner.model_copy(update={"ranks": ranks})
    return learner_memory(recipe.model_copy(update={"learner": learner}), shape, "gpu").total


def _too_little_memory(recipe: Recipe, shape: ModelShape, split: Split) -> list[str]:
    """What the recipe, as it is written, would run into."""
    from deploy.memory import actor_memory

    actor = actor_memory(recipe, shape, "gpu", A100_BYTES).total
    needs = {
        f"a learner rank of {split.ranks}": (
            _rank_bytes(recipe, shape, split.ranks),
            "set weights.route = 'gloo' or learner.zero_stage = 3",
        ),
        "an actor": (actor, "lower actor.gpu_memory_utilization"),
    }
    return [
        f"{who} would need about {size / 2**30:.0f} of {A100_BYTES / 2**30:.0f} GiB: {remedy}"
        for who, (size, remedy) in needs.items()
        if size > A100_BYTES
    ]


# --- showing it -----------------------------------------------------------------------------------------------


def _row(split: Split, recipe: Recipe, name: str) -> dict[str, Any]:
    outcome = split.outcome
    return {
        "name": name,
        "gpus": split.gpus,
        "ranks": split.ranks,
        "actors": split.actors,
        "actors_per_rank": split.actors / split.ranks,
        "step_s": outcome.step_s,
        "learner_idle": outcome.learner_idle,
        "actor_idle": outcome.actor_idle,
        "staleness_mean": outcome.staleness_mean,
        "staleness": outcome.staleness,
        "tokens_s": outcome.tokens_s,
        "hours": split.hours(recipe.run.steps),
    }


def _describe(workload: Workload) -> dict[str, Any]:
    lengths: LogNormal | Recorded = workload.lengths
    return {**{k: v for k, v in asdict(workload).items() if k != "lengths"}, "lengths": str(lengths)}


def _print(recipe: Recipe, found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console, work = Console(), found["workload"]
    if not console.is_terminal:
        console = Console(width=FILE_WIDTH)
    batch = recipe.batch
    console.print(
        f"[bold]{found['recipe']}[/bold]: {recipe.run.steps} steps of {batch.questions_per_step} x "
        f"{recipe.rollout.group_size} responses, max_staleness {batch.max_staleness}"
    )
    console.print(
        f"lengths {work['lengths']}; prompts {work['prompt_tokens']:.0f} tokens; "
        f"{work['filtered_share']:.0%} of the groups without gradient",
        highlight=False,
    )
    for figure, source in found["rates"]:
        console.print(f"  {figure} [dim]({source})[/dim]", highlight=False)
    table = Table(box=None, header_style="bold")
    for name in (
        "",
        "learner",
        "actors",
        "step s",
        "learner idle",
        "actors idle",
        "staleness",
        "tokens/s",
        "hours",
    ):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for row in found["rows"]:
        table.add_row(*_cells(row))
    console.print(table)
    if found["calibrated"]:
        console.print(f"recommended: {found['recommended']} actors for this learner", highlight=False)
    for note in found["notes"]:
        console.print(f"[dim]note: {note}[/dim]", highlight=False)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    shares = " ".join(f"{lag}:{share:.0%}" for lag, share in row["staleness"].items() if share >= 0.005)
    return (
        row["name"],
        str(row["ranks"]),
        str(row["actors"]),
        f"{row['step_s']:.2f}",
        f"{row['learner_idle']:.0%}",
        f"{row['actor_idle']:.0%}",
        f"{row['staleness_mean']:.2f} ({shares})",
        f"{row['tokens_s']:,.0f}",
        f"{row['hours']:.2f}",
    )
