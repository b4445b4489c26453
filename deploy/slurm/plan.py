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
from common.recipe import Recipe
from deploy.launch.program import own_program

TIME = re.compile(r"(\d+-)?\d+(:\d{1,2}){0,2}")
NAME = re.compile(r"[A-Za-z0-9._,:+-]+")
KEYS_FOLDER = "keys"


@dataclass(frozen=True)
class Options:
    """What the caller typed; None: not given."""

    learner_nodes: int
    actors: int
    partition: str | None = None
    actor_partition: str | None = None
    gpus_per_node: int | None = None
    time: str | None = None
    account: str | None = None
    qos: str | None = None
    interface: str | None = None
    setup: str | None = None
    extra: tuple[str, ...] = ()


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


def make_plan(recipe: Recipe, options: Options, *, program: tuple[str, ...] | None = None) -> Plan:
    """Resolve a submission.

    Args:
        recipe: the recipe that will run (see `cluster_overrides`).
        options: what the caller typed.
        program: argument vector of `slipstream`; default: this interpreter's.

    Raises:
        UserError: a value cannot stand in a batch file, or the learner's ranks do not fill its nodes.
    """
    _check_words(options)
    gpus = _gpus_per_node(recipe, options)
    return Plan(
        name=str(recipe.run.name),
        folder=recipe.folder.resolve(),
        directory=Path.cwd(),
        program=shlex.join(program or own_program()),
        options=options,
        ranks_per_node=gpus or _ranks_per_node(recipe, options),
        gpus_per_node=gpus,
        gpus_per_actor=recipe.actor.tensor_parallel if gpus else 0,
        cpus_per_rank=recipe.launch.learner_cores,
        cpus_per_actor=recipe.launch.actor_cores,
        restarts=recipe.launch.restarts,
        broker_port=recipe.broker.port,
        master_port=recipe.learner.master_port,
    )


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
    return [*overrides, f"actor.count={max(1, options.actors)}"]


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
    if options.time is not None and not TIME.fullmatch(options.time):
        raise UserError(
            f"'{options.time}' is not a time limit: write MINUTES, HH:MM:SS or DAYS-HH:MM:SS.",
            setting="--time",
        )
    words = ("partition", "actor_partition", "account", "qos", "interface")
    for word in words:
        value = getattr(options, word)
        if value is not None and not NAME.fullmatch(value):
            raise UserError(
                f"'{value}' is not a name that Slurm accepts.", setting=f"--{word.replace('_', '-')}"
            )
    for line in options.extra:
        if not line.startswith("-") or "\n" in line:
            raise UserError(
                f"'{line}' is not one option of sbatch, such as --constraint=a100.", setting="--sbatch"
            )
