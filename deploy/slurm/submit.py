"""`slipstream submit`: a run on a Slurm cluster.

Invariant: everything that can be refused is refused before the run folder exists, and a submission that fails
half-way takes back what it has sent: a run is on the cluster whole or not at all.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

import typer

from common.errors import UserError
from common.run_files import ADDRESS_FILE, RECIPE_FILE, SLURM_FOLDER, SLURM_STATE_FILE
from deploy.check import RecipeArgument, SetOption
from deploy.slurm.arguments import (
    Account,
    ActorPartition,
    ActorQos,
    Actors,
    ActorSbatch,
    ActorsPerJob,
    ActorTime,
    CpusPerGpu,
    DryRun,
    Fresh,
    GpusPerNode,
    HeadSbatch,
    Interface,
    Lead,
    LearnerNodes,
    Partition,
    Qos,
    Resume,
    Sbatch,
    Setup,
    Time,
)

if TYPE_CHECKING:
    from common.recipe import Recipe
    from deploy.slurm.plan import Options, Plan

LEAVE_S = 30.0  # Slurm's KillWait
FOUND_BY_THE_JOB = ('broker.bind="127.0.0.1"', 'weights.bind="127.0.0.1"')


def submit(
    recipe: RecipeArgument,
    learner_nodes: LearnerNodes = None,
    partition: Partition = None,
    actors: Actors = None,
    actors_per_job: ActorsPerJob = None,
    actor_partition: ActorPartition = None,
    gpus_per_node: GpusPerNode = None,
    cpus_per_gpu: CpusPerGpu = None,
    time: Time = None,
    actor_time: ActorTime = None,
    lead: Lead = None,
    account: Account = None,
    qos: Qos = None,
    actor_qos: ActorQos = None,
    interface: Interface = None,
    setup: Setup = None,
    sbatch: Sbatch = None,
    head_sbatch: HeadSbatch = None,
    actor_sbatch: ActorSbatch = None,
    overrides: SetOption = None,
    resume: Resume = False,
    fresh: Fresh = False,
    dry_run: DryRun = False,
) -> None:
    """Submit a recipe to Slurm: one job with broker and learner, and a job array of actors."""
    given = {
        "learner_nodes": learner_nodes,
        "actors": actors,
        "actors_per_job": actors_per_job,
        "partition": partition,
        "actor_partition": actor_partition,
        "gpus_per_node": gpus_per_node,
        "cpus_per_gpu": cpus_per_gpu,
        "time": time,
        "actor_time": actor_time,
        "lead": lead,
        "account": account,
        "qos": qos,
        "actor_qos": actor_qos,
        "interface": interface,
        "setup": setup,
        "extra": sbatch,
        "head_extra": head_sbatch,
        "actor_extra": actor_sbatch,
    }
    resolved, options = resolve(recipe, overrides or (), given, resume=resume)
    submit_recipe(resolved, options, resume=resume, fresh=fresh, dry_run=dry_run)


def resolve(
    recipe: str, overrides: Sequence[str], given: Mapping[str, Any], *, resume: bool
) -> tuple[Recipe, Options]:
    """The recipe that will run, and what to ask Slurm for.

    Args:
        recipe: a TOML file, or the name of a shipped recipe.
        overrides: "section.key=value" strings.
        given: what the caller typed, by the names of `Options`.
        resume: options that were not given are those of the earlier submission.
    """
    from common.recipe import find_recipe, load_recipe
    from deploy.slurm.plan import Options, cluster_overrides
    from deploy.slurm.state import earlier_state

    loaded = load_recipe(recipe, overrides)
    earlier = earlier_state(loaded.folder) if resume else None
    typed = {name: given[name] for name in Options.__dataclass_fields__ if given.get(name) not in (None, [])}
    defaults = {"learner_nodes": 1, "actors": loaded.actor.count}
    options = Options(**_tuples({**defaults, **(earlier.options if earlier else {}), **typed}))
    own = find_recipe(recipe).resolve() == (loaded.folder / RECIPE_FILE).resolve()
    # The broker has kept its node's addresses in the run's own recipe; the next job has others.
    forgotten = FOUND_BY_THE_JOB if own and earlier and earlier.finds_addresses else ()
    overrides = [*forgotten, *overrides]
    return load_recipe(recipe, [*overrides, *cluster_overrides(loaded, options)]), options


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def submit_recipe(
    recipe: Recipe,
    options: Options,
    *,
    resume: bool = False,
    fresh: bool = False,
    dry_run: bool = False,
    program: tuple[str, ...] | None = None,
) -> None:
    """Check, write and send the two batch files of a recipe that already holds `cluster_overrides`.

    Args:
        recipe: what will run.
        options: what to ask Slurm for.
        resume, fresh: as in `deploy.folder.prepare`.
        dry_run: stop after writing; needs no Slurm.
        program: argument vector of `slipstream` on the nodes; default: this interpreter's.

    Raises:
        UserError: anything that would keep a job from starting; nothing is then written or queued.
    """
    from broker.fitness import is_loopback
    from deploy.folder import holds_a_run, prepare
    from deploy.slurm.plan import make_plan
    from deploy.slurm.queue import default_limit, require_slurm
    from deploy.slurm.scripts import render
    from learner.outcome import forget_starts

    if not dry_run:
        require_slurm()
    limit = default_limit(options.partition) if not (dry_run or options.time) else None
    plan = make_plan(recipe, options, program=program, limit=limit)
    finds_addresses = is_loopback(recipe.broker.bind)
    scripts = render(plan, set_addresses=finds_addresses)
    _check_recipe(recipe, dry_run=dry_run)
    if not dry_run:
        _check_with_slurm(plan, scripts)
        _wait_until_left(recipe.folder)
    existed = holds_a_run(recipe.folder)
    rehearsed = existed and _never_sent(recipe.folder)
    folder = prepare(recipe, resume=resume or (rehearsed and not fresh), fresh=fresh)
    try:
        _make_keys(recipe)
        _write(folder, scripts)
        forget_starts(folder)
        if not dry_run:
            _send(plan, finds_addresses)
    except Exception:
        if not existed:
            shutil.rmtree(folder)  # ours, seconds old, and holding nothing but what we wrote
        raise
    _report(plan, recipe.broker.keys, dry_run=dry_run)


def _check_recipe(recipe: Recipe, *, dry_run: bool) -> None:
    from common.model_files import require_weights
    from deploy.preflight import (
        OF_THE_MACHINE,
        OF_THE_START,
        check_addresses,
        check_template,
        preflight,
    )

    if dry_run:  # may be far from the cluster, its model and its data
        check_template(recipe)
        check_addresses(recipe)
    else:
        preflight(recipe, without=(*OF_THE_START, *OF_THE_MACHINE))  # a login node has no GPUs
        require_weights(recipe.model.path)


def _wait_until_left(folder: Path) -> None:
    """The queue has no job of this name any more; the broker of a cancelled one takes seconds to leave."""
    from broker.run_folder import is_served

    deadline = monotonic() + LEAVE_S
    if is_served(folder):
        typer.echo(f"waiting for the broker that still serves '{folder}' to leave")
    while is_served(folder) and monotonic() < deadline:
        sleep(0.5)


def _never_sent(folder: Path) -> bool:
    """Whether a folder holds only what --dry-run has written: it may be written again."""
    ours = {RECIPE_FILE, "keys", SLURM_FOLDER}
    return {path.name for path in folder.iterdir()} <= ours and not (
        folder / SLURM_FOLDER / SLURM_STATE_FILE
    ).exists()


def _check_with_slurm(plan: Plan, scripts: dict[str, str]) -> None:
    from deploy.slurm import queue

    options = plan.options
    for option, partition in (
        ("--partition", options.partition),
        ("--actor-partition", options.actor_partition),
    ):
        if partition:
            queue.require_partition(partition, option=option)
    if waiting := queue.queued(plan.head_job) or queue.queued(plan.actors_job):
        raise UserError(
            f"a run with this name is already queued or running (job {waiting[0].job}): choose another run.name, or "
            f"cancel it with scancel --name={plan.head_job},{plan.actors_job}.",
            setting="run.name",
        )
    for name, script in scripts.items():
        if name != "actors.sbatch" or options.actors:
            _try(plan, name, script)


def _try(plan: Plan, name: str, script: str) -> None:
    from deploy.slurm import queue

    try:
        queue.try_script(script)
    except UserError as error:
        head = name == "head.sbatch"
        cpus, per_node = (
            (plan.cpus_per_rank, plan.ranks_per_node)
            if head
            else (plan.cpus_per_actor, plan.options.actors_per_job)
        )
        if plan.options.cpus_per_gpu or not (plan.gpus_per_node and cpus):
            raise
        asked = f"{name} asks for {cpus * per_node} cores of a node; if that is too many: --cpus-per-gpu"
        raise UserError(f"{error} ({asked}.)") from None


def _make_keys(recipe: Recipe) -> None:
    from common.keys import check_server, make_keys

    keys = recipe.broker.keys
    if keys is None:
        return
    if not any(keys.glob("*.key_secret")):
        make_keys(keys)
    check_server(keys)


def _write(folder: Path, scripts: dict[str, str]) -> None:
    try:
        (folder / SLURM_FOLDER).mkdir(exist_ok=True)
        for name, script in scripts.items():
            (folder / SLURM_FOLDER / name).write_text(script, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write '{folder}': {error.strerror}.", setting="run.root") from None


def _send(plan: Plan, finds_addresses: bool) -> None:
    from deploy.slurm import queue
    from deploy.slurm.state import State, write_state

    files = plan.folder / SLURM_FOLDER
    head = queue.submit_file(str(files / "head.sbatch"))
    arrays: list[int] = []
    try:
        if plan.options.actors:
            # Actors start with the head or after it: GPUs that only wait are wasted.
            arrays.append(queue.submit_file(str(files / "actors.sbatch"), f"--dependency=after:{head}"))
        state = State(plan.name, head, arrays, options=asdict(plan.options), finds_addresses=finds_addresses)
        write_state(plan.folder, state)
    except Exception:
        queue.cancel(map(str, [head, *arrays]))
        raise


def _report(plan: Plan, keys: Path | None, *, dry_run: bool) -> None:
    options = plan.options
    per_node = f"{plan.gpus_per_node} GPUs" if plan.gpus_per_node else "on the CPU"
    typer.echo(
        f"run {plan.name}: learner of {plan.ranks} ranks on {options.learner_nodes} nodes ({per_node} each), "
        f"{options.actors} actors; files in {plan.folder / SLURM_FOLDER}"
    )
    if not any(line.startswith("--mem") for line in (*options.extra, *options.head_extra)):
        typer.echo(
            "no memory is asked for: where `scontrol show config` has a small DefMemPerCPU or DefMemPerNode, give "
            "--sbatch=--mem-per-gpu=60G or the like (by estimate a 7B learner of 4 ranks takes 100 GB of its node)"
        )
    if dry_run:
        typer.echo("nothing was submitted (--dry-run)")
        return
    from deploy.slurm.state import read_state

    state = read_state(plan.folder)
    actors = f", actors in job array {state.arrays[0]}" if state.arrays else ""
    typer.echo(f"broker and learner are job {state.head}{actors}")
    typer.echo(
        f"watch: slipstream status {plan.name} --watch    more actors: slipstream scale {plan.name} --actors N"
    )
    typer.echo(
        f"an actor that does not see this folder: slipstream actor --join HOST:PORT{f' --keys {keys}' if keys else ''} "
        f"(the address is in {plan.folder / ADDRESS_FILE} once the job runs; copy the keys there)"
    )
