"""What a submission asks Slurm for: resolved numbers and names, before any file is written.

Invariant: a plan is free of contradictions: its ranks fill its nodes, its recipe is the one that will run, and
every value is safe to stand in a batch file. Pure: neither Slurm nor the disk is touched.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.program import own_program
from common.recipe import Recipe

TIME = re.compile(r"(\d+-)?\d+(:\d{1,2}){0,2}")
NAME = re.compile(r"[A-Za-z0-9._,:+-]+")
KEYS_FOLDER = "keys"
CPUS_PER_GPU = 8  # an A100 node has 8 to 16 per GPU
# How long before the time limit a job is warned: a step of a 7B learner takes a minute, its checkpoint of 130 GB
# minutes on a busy file system; an actor finishes what it has in hand.
HEAD_LEAD_S, ACTOR_LEAD_S = 900, 120
REQUEUE_S = 30  # what a requeue is given before the limit


@dataclass(frozen=True)
class Options:
    """What the caller typed; None: not given.

    Attributes:
        actors, actors_per_job: how many there shall be, and how many of them share a task of the array.
        extra, head_extra, actor_extra: options of sbatch for both kinds of jobs, and for one of them.
    """

    learner_nodes: int
    actors: int
    actors_per_job: int = 1
    partition: str | None = None
    actor_partition: str | None = None
    gpus_per_node: int | None = None
    cpus_per_gpu: int | None = None
    time: str | None = None
    actor_time: str | None = None
    lead: int | None = None
    account: str | None = None
    qos: str | None = None
    actor_qos: str | None = None
    interface: str | None = None
    setup: str | None = None
    extra: tuple[str, ...] = ()
    head_extra: tuple[str, ...] = ()
    actor_extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Notice:
    """When a job hears of its time limit.

    Attributes:
        lead: seconds before the limit at which Slurm sends USR1 (or up to a minute earlier).
        grace: seconds after it until the job goes back into the queue, whatever its workers do.
    """

    lead: int

    @property
    def grace(self) -> int:
        return max(self.lead - REQUEUE_S, self.lead // 2)


@dataclass(frozen=True)
class Plan:
    """Everything that the templates need.

    Attributes:
        name: of the run; its jobs are `slipstream-NAME` and `slipstream-NAME-actors`.
        folder: absolute run folder, on a file system that all nodes share.
        directory: where relative paths of the recipe start.
        program: argument vector of `slipstream`, quoted for the shell.
        ranks_per_node, gpus_per_node: of the learner; 0 GPUs: it runs on the CPU.
        gpus_per_actor: tensor parallelism of an actor, or 0.
        cpus_per_rank, cpus_per_actor: None: what the cluster gives, or what an option of sbatch says.
        head_notice, actor_notice: of the time limit.
        restarts: of one worker before its job gives up.
    """

    name: str
    folder: Path
    directory: Path
    program: str
    options: Options
    ranks_per_node: int
    gpus_per_node: int
    gpus_per_actor: int
    cpus_per_rank: int | None
    cpus_per_actor: int | None
    head_notice: Notice
    actor_notice: Notice
    restarts: int
    broker_port: int
    master_port: int

    @property
    def head_job(self) -> str:
        """Job name of broker and learner."""
        return f"slipstream-{self.name}"

    @property
    def actors_job(self) -> str:
        """Job name of the actors' array."""
        return f"slipstream-{self.name}-actors"

    @property
    def ranks(self) -> int:
        """Data-parallel ranks of the learner."""
        return self.options.learner_nodes * self.ranks_per_node

    @property
    def actor_tasks(self) -> int:
        """Tasks of the actors' array."""
        return tasks_of(self.options.actors, self.options.actors_per_job)


def make_plan(
    recipe: Recipe, options: Options, *, program: tuple[str, ...] | None = None, limit: str | None = None
) -> Plan:
    """Resolve a submission.

    Args:
        recipe: the recipe that will run (see `cluster_overrides`).
        options: what the caller typed.
        program: argument vector of `slipstream`; default: this interpreter's.
        limit: the partition's own time limit, where it is known; `options.time` goes before it.

    Raises:
        UserError: a value cannot stand in a batch file, or the learner's ranks do not fill its nodes.
    """
    _check_words(options)
    tasks_of(options.actors, options.actors_per_job)
    gpus = _gpus_per_node(recipe, options)
    if options.cpus_per_gpu and not gpus:
        raise UserError("this recipe runs on the CPU: set launch.learner_cores.", setting="--cpus-per-gpu")
    per_gpu = (options.cpus_per_gpu or CPUS_PER_GPU) if gpus else None
    per_actor = per_gpu and per_gpu * recipe.actor.tensor_parallel
    return Plan(
        name=str(recipe.run.name),
        folder=recipe.folder.resolve(),
        directory=Path.cwd(),
        program=shlex.join(program or own_program()),
        options=options,
        ranks_per_node=gpus or _ranks_per_node(recipe, options),
        gpus_per_node=gpus,
        gpus_per_actor=recipe.actor.tensor_parallel if gpus else 0,
        cpus_per_rank=_cpus(recipe.launch.learner_cores or per_gpu, (*options.extra, *options.head_extra)),
        cpus_per_actor=_cpus(recipe.launch.actor_cores or per_actor, (*options.extra, *options.actor_extra)),
        head_notice=_notice(options.time or limit, options.lead, HEAD_LEAD_S),
        actor_notice=_notice(options.actor_time or options.time or limit, None, ACTOR_LEAD_S),
        restarts=recipe.launch.restarts,
        broker_port=recipe.broker.port,
        master_port=recipe.learner.master_port,
    )


def tasks_of(actors: int, per_job: int) -> int:
    """Tasks of the array that hold so many actors.

    Raises:
        UserError: they do not fill them.
    """
    if actors % per_job:
        raise UserError(f"{actors} is not a multiple of --actors-per-job {per_job}.", setting="--actors")
    return actors // per_job


def cluster_overrides(recipe: Recipe, options: Options) -> list[str]:
    """Settings that a cluster needs and a laptop's recipe leaves out, as `--set` strings.

    The addresses themselves are known only when the job starts: its script sets `broker.bind` and `weights.bind`.
    """
    overrides = []
    if recipe.broker.keys is None:
        overrides.append(f'broker.keys="{recipe.folder.resolve() / KEYS_FOLDER}"')
    gpus = _gpus_per_node(recipe, options)
    if gpus:
        overrides += [f"learner.ranks={options.learner_nodes * gpus}", 'launch.device="gpu"']
    if "fsync" not in recipe.broker.model_fields_set:
        # What a lost node had not written is lost on a shared file system, as in a power cut on a local one.
        overrides.append("broker.fsync=true")
    return [*overrides, f"actor.count={max(1, options.actors)}"]


def seconds_of(limit: str) -> int:
    """Seconds of a time limit as Slurm writes it: MINUTES[:SECONDS], HH:MM:SS, DAYS-HH[:MM[:SS]]."""
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(a * b for a, b in zip(parts, units, strict=False))


def _notice(limit: str | None, lead: int | None, default: int) -> Notice:
    """A notice that leaves a short job three quarters of its time."""
    seconds = None if limit is None else seconds_of(limit)
    if lead is not None and seconds is not None and lead >= seconds:
        raise UserError(f"{lead} s are not less than the time limit, {limit}.", setting="--lead")
    return Notice(lead or (default if seconds is None else min(default, seconds // 4)))


def _cpus(wanted: int | None, extra: tuple[str, ...]) -> int | None:
    named = any(line.startswith(("--cpus-per-", "-c")) for line in extra)
    return None if named else wanted


def _gpus_per_node(recipe: Recipe, options: Options) -> int:
    if recipe.launch.device == "cpu" or options.gpus_per_node == 0:
        if options.gpus_per_node:
            raise UserError(
                f"{options.gpus_per_node} GPUs contradict the recipe's launch.device = 'cpu'.",
                setting="--gpus-per-node",
            )
        return 0
    return options.gpus_per_node or _ranks_per_node(recipe, options)


def _ranks_per_node(recipe: Recipe, options: Options) -> int:
    ranks, nodes = recipe.learner.ranks, options.learner_nodes
    if ranks % nodes:
        raise UserError(
            f"{nodes} nodes do not divide the {ranks} ranks of the recipe: set learner.ranks, or give --gpus-per-node.",
            setting="--learner-nodes",
        )
    return ranks // nodes


def _check_words(options: Options) -> None:
    for setting, limit in (("--time", options.time), ("--actor-time", options.actor_time)):
        if limit is not None and not TIME.fullmatch(limit):
            raise UserError(
                f"'{limit}' is not a time limit: write MINUTES, HH:MM:SS or DAYS-HH:MM:SS.", setting=setting
            )
    words = ("partition", "actor_partition", "account", "qos", "actor_qos", "interface")
    for word in words:
        value = getattr(options, word)
        if value is not None and not NAME.fullmatch(value):
            raise UserError(
                f"'{value}' is not a name that Slurm accepts.", setting=f"--{word.replace('_', '-')}"
            )
    kinds = {
        "--sbatch": options.extra,
        "--head-sbatch": options.head_extra,
        "--actor-sbatch": options.actor_extra,
    }
    for setting, lines in kinds.items():
        for line in lines:
            _check_line(setting, line)


def _check_line(setting: str, line: str) -> None:
    if not line.startswith("-") or "\n" in line:
        raise UserError(f"'{line}' is not one option of sbatch, such as --constraint=a100.", setting=setting)
    if line.startswith("--signal"):
        raise UserError("the scripts need their own --signal: use --lead for its time.", setting=setting)
    if re.match(r"--time\b(?!-)|-t", line):
        raise UserError(
            "the warning before the limit goes by --time and --actor-time: use them.", setting=setting
        )
