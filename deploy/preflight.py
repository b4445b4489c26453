"""Everything that can be known to be wrong before any engine starts.

Invariant: a run that passes these checks fails later only for reasons that no check could see; each defect is
one `UserError` that names the setting. Nothing is started, written or left open.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import socket
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.model_files import ModelShape, read_shape, require_tokenizer
from common.recipe import Recipe
from common.run_files import SLURM_FOLDER, SLURM_STATE_FILE
from common.telemetry import visible_gpus
from deploy.folder import resume_command
from deploy.launch.layout import share_out
from deploy.launch.machine import this_machine
from deploy.memory import actor_memory, free_host_bytes, learner_memory, smallest_gpu_bytes

log = logging.getLogger("slipstream.preflight")

CHECKPOINT_BYTES_PER_PARAMETER = 18  # state, master weights and the Hugging Face export, per checkpoint
MIB = 1 << 20
TRACKING_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "file", "databricks")


@dataclass
class Subject:
    """A recipe that is looked at, and what the checks have found out about it.

    Attributes:
        note: is given what is odd, but no reason to refuse.
        shape: sizes of the model; None before they are known.
        questions: number of training questions; None before they are known.
    """

    recipe: Recipe
    note: Callable[[str], object]
    shape: ModelShape | None = None
    questions: int | None = None

    def _read_model(self) -> None:
        self.shape = check_model(self.recipe)

    def _read_questions(self) -> None:
        self.questions = check_questions(self.recipe, self.note)

    def _with_sizes(self, check: Callable[[Recipe, ModelShape], None]) -> None:
        if self.shape is not None:  # else it has been said that they are unknown
            check(self.recipe, self.shape)


# What `slipstream run` refuses and `slipstream check` foretells, in the order in which it is said: what is quick to
# know comes first.
CHECKS: dict[str, Callable[[Subject], None]] = {
    "template": lambda subject: check_template(subject.recipe),
    "objective": lambda subject: check_objective(subject.recipe),
    "addresses": lambda subject: check_addresses(subject.recipe),
    "tracking": lambda subject: check_tracking(subject.recipe),
    "host": lambda subject: check_host(subject.recipe),
    "ports": lambda subject: check_ports(subject.recipe),
    "keys": lambda subject: check_keys(subject.recipe),
    "route": lambda subject: check_route(subject.recipe),
    "devices": lambda subject: check_devices(subject.recipe),
    "model": Subject._read_model,
    "reward": lambda subject: check_reward(subject.recipe),
    "disk": lambda subject: subject._with_sizes(check_disk),
    "memory": lambda subject: subject._with_sizes(check_memory),
    "questions": Subject._read_questions,
}
# Those that only hold on the machine of learner and actors, and those that only hold once the run is about to start.
OF_THE_MACHINE = ("route", "devices", "memory")
OF_THE_START = ("host", "ports", "keys")


def preflight(recipe: Recipe, *, without: Collection[str] = ()) -> None:
    """Check a recipe against this machine.

    Args:
        without: names of `CHECKS` that do not matter here.

    Raises:
        UserError: the first defect.
    """
    examine(Subject(recipe, log.warning), _refuse, without)


def examine(
    subject: Subject, refused: Callable[[str, UserError, Subject], None], without: Collection[str] = ()
) -> None:
    """Do the checks in their order; `refused` is given the name of a check and what it found, and may raise it."""
    for name, check in CHECKS.items():
        if name not in without:
            try:
                check(subject)
            except UserError as error:
                refused(name, error, subject)


def _refuse(_name: str, error: UserError, _subject: Subject) -> None:
    raise error


def check_model(recipe: Recipe) -> ModelShape:
    """The model exists, has a tokenizer, and its context holds what the recipe wants."""
    shape = read_shape(recipe.model.path)
    require_tokenizer(recipe.model.path)
    if recipe.model.max_context > shape.context:
        raise UserError(
            f"{recipe.model.max_context} tokens are more than the model's context of {shape.context}.",
            setting="model.max_context",
        )
    heads = recipe.actor.tensor_parallel
    if shape.heads % heads or (shape.kv_heads % heads and heads % shape.kv_heads):
        raise UserError(
            f"{heads} does not divide the model's {shape.heads} attention heads ({shape.kv_heads} for keys).",
            setting="actor.tensor_parallel",
        )
    return shape


def check_template(recipe: Recipe) -> None:
    """The template exists, or is a text that contains {question}."""
    from common.tasks.templates import get_template

    get_template(recipe.data.template)


def check_questions(recipe: Recipe, note: Callable[[str], object] = log.warning) -> int:
    """Every question set loads and has the named fields; returns the number of training questions.

    Args:
        note: is given what is odd, but no reason to refuse (the paper's MATH-12K has two empty gold answers).
    """
    from common.tasks.from_recipe import held_out_questions, training_questions
    from common.tasks.sets import doubtful_golds

    train = training_questions(recipe)
    if len(train) < recipe.batch.questions_per_step:
        raise UserError(
            f"the set has {len(train)} questions, fewer than one step takes "
            f"(batch.questions_per_step = {recipe.batch.questions_per_step}).",
            setting="data.train",
        )
    named = {recipe.data.train: train} | held_out_questions(recipe)
    for name, questions in named.items():
        for phrase in doubtful_golds(questions):
            note(f"question set '{name}': {phrase}.")
    return len(train)


def check_reward(recipe: Recipe) -> None:
    """The reward is `math` or a function that can be imported."""
    from common.verifier.rewards import load_reward

    name = recipe.data.reward
    if name == "math":
        return
    if ":" not in name:
        raise UserError(f"'{name}' is neither 'math' nor 'package.module:function'.", setting="data.reward")
    try:
        load_reward(name)
    except UserError as error:
        reason = str(error).removeprefix(f"{error.setting}: ")
        raise UserError(f"{' '.join(reason.split())}.", setting="data.reward") from None


def check_addresses(recipe: Recipe) -> None:
    """Sockets bind to loopback unless there are keys (I8)."""
    from broker.fitness import check_bind

    check_bind(recipe)


def check_objective(recipe: Recipe) -> None:
    """The parts of the objective go together, and each setting is read by one of them.

    A preset as it stands needs no look, and torch, which takes seconds to load, is left alone.
    """
    if recipe.algorithm.model_dump(exclude={"preset"}, exclude_defaults=True):
        from learner.objective import objective_of

        objective_of(recipe)


def check_tracking(recipe: Recipe) -> None:
    """MLflow's address is one; whether anybody answers there does not matter, an outage stops no run."""
    uri = recipe.tracking.uri
    scheme, separator, _ = (uri or "").partition(":")
    if uri is None or not separator or scheme.partition("+")[0] in TRACKING_SCHEMES:  # without one: a folder
        return
    hint = f"; for a server: 'http://{uri}'" if "//" not in uri else ""
    raise UserError(
        f"'{uri}' begins with none of {', '.join(TRACKING_SCHEMES)}{hint}.", setting="tracking.uri"
    )


def check_host(recipe: Recipe) -> None:
    """The addresses that broker and learner listen on are this machine's: a run on Slurm keeps those of its node."""
    for setting, address in (("broker.bind", recipe.broker.bind), ("weights.bind", recipe.weights.bind)):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((address, 0))
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    continue  # said where a port is wanted there
                sent = (recipe.folder / SLURM_FOLDER / SLURM_STATE_FILE).exists()
                remedy = f"; the run was sent to Slurm: {resume_command(recipe.folder)}" if sent else ""
                raise UserError(
                    f"'{address}' is not an address of this machine{remedy}.", setting=setting
                ) from None


def check_ports(recipe: Recipe) -> None:
    """Ports that the recipe fixes are free, and no two of them the same."""
    fixed = (
        ("broker.port", recipe.broker.bind, recipe.broker.port),
        ("broker.metrics_port", "127.0.0.1", recipe.broker.metrics_port),
        ("weights.port", recipe.weights.bind, recipe.weights.port),
        ("learner.master_port", "127.0.0.1", recipe.learner.master_port),
    )
    takers: dict[tuple[str, int], str] = {}
    for setting, address, port in fixed:
        if not port:
            continue
        earlier = takers.setdefault((address, port), setting)
        if earlier != setting:
            raise UserError(f"port {port} on {address} is {earlier}'s already.", setting=setting)
        _require_free(setting, address, port)


def _require_free(setting: str, address: str, port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            reason = "in use" if error.errno == errno.EADDRINUSE else os.strerror(error.errno or 0)
            raise UserError(f"port {port} on {address} cannot be used: {reason}.", setting=setting) from None


def check_route(recipe: Recipe) -> None:
    """The route of the weights is one that this machine has; what `nccl` needs are GPUs."""
    gpus = visible_gpus() if recipe.launch.device != "cpu" else []
    if recipe.weights.route == "nccl" and not gpus:
        raise UserError(
            "'nccl' needs the learner on a GPU: take 'auto', 'gloo' or 'disk'.", setting="weights.route"
        )


def check_devices(recipe: Recipe) -> None:
    """This machine has the cores or GPUs that the recipe gives to its processes."""
    share_out(recipe, *this_machine())


def check_keys(recipe: Recipe) -> None:
    """The folder of keys, if the recipe names one, has what the broker and its peers need."""
    from common.keys import check_client, check_server

    if recipe.broker.keys is not None:
        check_server(recipe.broker.keys)
        check_client(recipe.broker.keys)


def check_disk(recipe: Recipe, shape: ModelShape) -> None:
    """There is room for the checkpoints that the recipe keeps, and the run folder can be written."""
    root = _existing_parent(recipe.run.root)
    if not os.access(root, os.W_OK):
        raise UserError(f"'{root}' cannot be written.", setting="run.root")
    kept = recipe.learner.keep_last + 1 + int(recipe.learner.keep_best)
    needed = kept * CHECKPOINT_BYTES_PER_PARAMETER * shape.parameters + 200 * MIB
    free = shutil.disk_usage(root).free
    if free < needed:
        raise UserError(
            f"'{root}' has {free / MIB:,.0f} MiB free, but {kept} checkpoints need about {needed / MIB:,.0f} MiB: "
            "free some, choose another folder, or lower learner.keep_last.",
            setting="run.root",
        )


def check_memory(recipe: Recipe, shape: ModelShape) -> None:
    """The learner's ranks and the actors fit into this machine's memory, or into its GPUs."""
    gpus = visible_gpus() if recipe.launch.device != "cpu" else []
    if gpus:
        _check_gpu_memory(recipe, shape, smallest_gpu_bytes(gpus))
    else:
        _check_host_memory(recipe, shape, free_host_bytes())


def _check_host_memory(recipe: Recipe, shape: ModelShape, free: float) -> None:
    learner = learner_memory(recipe, shape, "cpu").total * recipe.learner.ranks
    actors = actor_memory(recipe, shape, "cpu").total * recipe.actor.count * recipe.actor.tensor_parallel
    if learner + actors <= free:
        return
    needed = (
        f"the run needs about {(learner + actors) / MIB:,.0f} MiB of memory (learner {learner / MIB:,.0f}, actors "
        f"{actors / MIB:,.0f}), but {free / MIB:,.0f} MiB are free"
    )
    if actors > learner:
        raise UserError(f"{needed}: lower actor.kv_cache_mb or actor.count.", setting="actor.count")
    raise UserError(
        f"{needed}: lower it, or set learner.gradient_checkpointing.", setting="learner.micro_batch_tokens"
    )


def _check_gpu_memory(recipe: Recipe, shape: ModelShape, size: float | None) -> None:
    if size is None:
        return
    learner = learner_memory(recipe, shape, "gpu").total
    actor = actor_memory(recipe, shape, "gpu", size).total
    if recipe.launch.shared_gpu:
        learner, actor = learner + actor, learner + actor
    if learner > size and not recipe.launch.shared_gpu:
        raise UserError(
            f"a learner rank needs about {learner / MIB:,.0f} MiB, but the GPU has {size / MIB:,.0f} MiB: lower "
            "learner.micro_batch_tokens, raise learner.ranks or learner.zero_stage, or keep the snapshots in host "
            "memory (weights.route = 'gloo').",
            setting="learner.micro_batch_tokens",
        )
    if actor > size:
        raise UserError(
            f"vLLM plus the receive buffers of a weight push need about {actor / MIB:,.0f} MiB, but the GPU has "
            f"{size / MIB:,.0f} MiB: lower actor.gpu_memory_utilization.",
            setting="actor.gpu_memory_utilization",
        )


def meant_for_gpus(recipe: Recipe) -> bool:
    """Whether the recipe is written for GPUs that this machine does not have."""
    if recipe.launch.device != "auto" or visible_gpus():
        return False
    wanted = recipe.learner.ranks + recipe.actor.count * recipe.actor.tensor_parallel
    return recipe.model.dtype == "bfloat16" or wanted > len(os.sched_getaffinity(0))


def _existing_parent(path: Path) -> Path:
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path
