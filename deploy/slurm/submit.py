"""`slipstream submit`: a run on a Slurm cluster.

Invariant: everything that can be refused is refused before the run folder exists, and a submission that fails
half-way takes back what it has sent: a run is on the cluster whole or not at all.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.errors import UserError
from deploy.check import RecipeArgument, SetOption

if TYPE_CHECKING:
    from common.recipe import Recipe
    from deploy.slurm.plan import Options, Plan


def submit(
    recipe: RecipeArgument,
    learner_nodes: Annotated[int, typer.Option(min=1, help="Nodes of the learner.")] = 1,
    partition: Annotated[
        str | None, typer.Option(help="Partition of all jobs; default: the cluster's.")
    ] = None,
    actors: Annotated[
        int | None, typer.Option(min=0, help="Actors, each a task of a job array; default: actor.count.")
    ] = None,
    actor_partition: Annotated[str | None, typer.Option(help="Another partition for the actors.")] = None,
    gpus_per_node: Annotated[
        int | None,
        typer.Option(
            min=0, help="GPUs, and so ranks, per learner node; default: learner.ranks / nodes; 0: CPU."
        ),
    ] = None,
    time: Annotated[
        str | None, typer.Option(help="Time limit; near it a job saves its work and queues again.")
    ] = None,
    account: Annotated[str | None, typer.Option(help="Slurm account.")] = None,
    qos: Annotated[str | None, typer.Option(help="Slurm quality of service.")] = None,
    interface: Annotated[
        str | None, typer.Option(help="Network interface of NCCL, gloo and the broker, e.g. ib0.")
    ] = None,
    setup: Annotated[
        str | None, typer.Option(help="Shell commands that each job runs first, e.g. 'module load cuda'.")
    ] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option("--sbatch", metavar="OPTION", help="Another option of sbatch, e.g. --constraint=a100."),
    ] = None,
    overrides: SetOption = None,
    resume: Annotated[bool, typer.Option(help="Continue the run in its folder.")] = False,
    fresh: Annotated[bool, typer.Option(help="Set an earlier run of this name aside.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Only write the batch files; submit nothing.")] = False,
) -> None:
    """Submit a recipe to Slurm: one job with broker and learner, and a job array of actors."""
    from common.recipe import load_recipe
    from deploy.slurm.plan import Options, cluster_overrides

    loaded = load_recipe(recipe, overrides or ())
    options = Options(
        learner_nodes=learner_nodes,
        actors=loaded.actor.count if actors is None else actors,
        partition=partition,
        actor_partition=actor_partition,
        gpus_per_node=gpus_per_node,
        time=time,
        account=account,
        qos=qos,
        interface=interface,
        setup=setup,
        extra=tuple(sbatch or ()),
    )
    resolved = load_recipe(recipe, [*(overrides or ()), *cluster_overrides(loaded, options)])
    submit_recipe(resolved, options, resume=resume, fresh=fresh, dry_run=dry_run)


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
    from broker.main import is_loopback
    from deploy.folder import holds_a_run, prepare
    from deploy.preflight import check_addresses, check_template, preflight
    from deploy.slurm.plan import make_plan
    from deploy.slurm.queue import require_slurm
    from deploy.slurm.scripts import render

    plan = make_plan(recipe, options, program=program)
    scripts = render(plan, set_addresses=is_loopback(recipe.broker.bind))
    if dry_run:  # may be far from the cluster, its model and its data
        check_template(recipe)
        check_addresses(recipe)
    else:
        require_slurm()
        preflight(recipe, ports=False, memory=False)  # a login node has no GPUs
        _check_with_slurm(plan, scripts)
    existed = holds_a_run(recipe.folder)
    rehearsed = existed and _never_sent(recipe.folder)
    folder = prepare(recipe, resume=resume or (rehearsed and not fresh), fresh=fresh)
    try:
        _make_keys(recipe)
        _write(folder, scripts)
        if not dry_run:
            _send(plan)
    except Exception:
        if not existed:
            shutil.rmtree(folder)  # ours, seconds old, and holding nothing but what we wrote
        raise
    _report(plan, dry_run=dry_run)


def _never_sent(folder: Path) -> bool:
    """Whether a folder holds only what --dry-run has written: it may be written again."""
    ours = {"recipe.toml", "keys", "slurm"}
    return {path.name for path in folder.iterdir()} <= ours and not (folder / "slurm" / "state.json").exists()


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
            f"a run of this name is on the cluster already (job {waiting[0].job}): choose another, or end it with "
            f"scancel --name={plan.head_job},{plan.actors_job}.",
            setting="run.name",
        )
    for name, script in scripts.items():
        if name != "actors.sbatch" or options.actors:
            queue.try_script(script)


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
        (folder / "slurm").mkdir(exist_ok=True)
        for name, script in scripts.items():
            (folder / "slurm" / name).write_text(script, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write '{folder}': {error.strerror}.", setting="run.root") from None


def _send(plan: Plan) -> None:
    from deploy.slurm import queue
    from deploy.slurm.state import State, write_state

    files = plan.folder / "slurm"
    head = queue.submit_file(str(files / "head.sbatch"))
    arrays: list[int] = []
    try:
        if plan.options.actors:
            # Actors start with the head or after it: GPUs that only wait are wasted.
            arrays.append(queue.submit_file(str(files / "actors.sbatch"), f"--dependency=after:{head}"))
        write_state(plan.folder, State(run=plan.name, head=head, arrays=arrays))
    except Exception:
        queue.cancel(map(str, [head, *arrays]))
        raise


def _report(plan: Plan, *, dry_run: bool) -> None:
    options = plan.options
    per_node = f"{plan.gpus_per_node} GPUs" if plan.gpus_per_node else "on the CPU"
    typer.echo(
        f"run {plan.name}: learner of {plan.ranks} ranks on {options.learner_nodes} nodes ({per_node} each), "
        f"{options.actors} actors; files in {plan.folder / 'slurm'}"
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
