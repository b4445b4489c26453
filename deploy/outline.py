"""A recipe as a person reads it: what one step consumes, what bounds it, where it runs, what it needs.

Invariant: every figure is computed from the recipe, the model's sizes and this machine.
"""

from __future__ import annotations

from common.model_files import ModelShape
from common.recipe import Recipe
from common.telemetry import visible_gpus
from deploy.launch.layout import Share, share_out
from deploy.launch.machine import this_machine
from deploy.memory import MIB, Device, actor_memory, learner_memory, smallest_gpu_bytes
from deploy.preflight import meant_for_gpus


def outline(recipe: Recipe, shape: ModelShape | None, questions: int | None) -> list[tuple[str, str]]:
    """Rows (name, text).

    Args:
        recipe: the resolved recipe.
        shape: sizes of the model, or None where they are unknown.
        questions: number of training questions, or None where it is unknown.
    """
    rows = [
        ("folder", str(recipe.folder)),
        ("model", _model(recipe, shape)),
        ("questions", _questions(recipe, questions)),
        ("step", _step(recipe)),
        ("run", _length(recipe, questions)),
        ("staleness", _staleness(recipe)),
        ("objective", _objective(recipe)),
        ("learner", _learner(recipe)),
        ("actors", _actors(recipe)),
        ("evaluation", _evaluation(recipe)),
        ("devices", _devices(recipe)),
        ("ports", _ports(recipe)),
    ]
    return [*rows, ("memory", _memory(recipe, shape))] if shape else rows


def _model(recipe: Recipe, shape: ModelShape | None) -> str:
    size = f"{shape.parameters:,} parameters, " if shape else ""
    return f"{recipe.model.path}: {size}{recipe.model.dtype}, context {recipe.model.max_context} tokens"


def _questions(recipe: Recipe, questions: int | None) -> str:
    template = recipe.data.template
    short = template if len(template) < 30 else repr(template[:27]) + "..."
    return f"{recipe.data.train}{f' ({questions:,})' if questions else ''}, template {short}"


def _step(recipe: Recipe) -> str:
    batch = recipe.batch
    return (
        f"{batch.questions_per_step} questions x {recipe.rollout.group_size} responses = "
        f"{recipe.responses_per_step}, in {batch.optimizer_steps} optimizer steps of "
        f"N = {recipe.responses_per_optimizer_step}; L = {recipe.normaliser:g} tokens"
    )


def _length(recipe: Recipe, questions: int | None) -> str:
    text = f"{recipe.run.steps} steps"
    if not questions:
        return text
    epochs = recipe.run.steps * recipe.batch.questions_per_step / questions
    cap = f" (ends early, after {recipe.data.max_epochs})" if epochs > recipe.data.max_epochs else ""
    return f"{text}, {epochs:.2f} epochs{cap}"


def _staleness(recipe: Recipe) -> str:
    batch = recipe.batch
    groups = (batch.max_staleness + 1) * batch.questions_per_step
    kind = "synchronous" if batch.max_staleness == 0 else "asynchronous"
    return f"{kind}: at most {batch.max_staleness} versions, {groups} groups in flight, buffered and taken"


def _objective(recipe: Recipe) -> str:
    algorithm = recipe.algorithm
    parts = [f"preset {algorithm.preset}"]
    replaced = ("advantage", "loss", "anchor", "correction", "aggregation")
    chosen = {name: getattr(algorithm, name) for name in replaced}
    parts += [f"{name} {value}" for name, value in chosen.items() if value]
    parts.append(f"KL {algorithm.kl_beta:g}" if algorithm.kl_beta else "no reference model")
    return ", ".join(parts)


def _learner(recipe: Recipe) -> str:
    learner = recipe.learner
    return f"{learner.ranks} x ZeRO-{learner.zero_stage}, lr {learner.lr:g} {learner.schedule}, weights by {recipe.weights.route}"


def _actors(recipe: Recipe) -> str:
    actor = recipe.actor
    return f"{actor.count} x tensor parallel {actor.tensor_parallel}, {actor.max_sequences} sequences each"


def _evaluation(recipe: Recipe) -> str:
    if not recipe.eval.sets:
        return "none (eval.sets is empty)"
    answers = f"greedy and {recipe.eval.samples} sampled" if recipe.eval.samples else "greedy"
    return f"every {recipe.eval.every} versions on {', '.join(recipe.eval.sets)}: {answers}"


def _devices(recipe: Recipe) -> str:
    if meant_for_gpus(recipe):
        wanted = recipe.learner.ranks + recipe.actor.count * recipe.actor.tensor_parallel
        return f"made for {wanted} GPUs; this machine has none"
    layout = share_out(recipe, *this_machine())
    name = "GPU" if layout.device == "gpu" else "core"

    def part(share: Share) -> str:
        return ",".join(share.gpus if layout.device == "gpu" else map(str, share.cores or ("any",)))

    return (
        f"{name}s: learner {part(layout.learner)}; actors {'; '.join(part(share) for share in layout.actors)}"
    )


def _ports(recipe: Recipe) -> str:
    def port(number: int) -> str:
        return str(number) if number else "a free port"

    broker, weights = recipe.broker, recipe.weights
    return (
        f"broker {broker.bind}:{port(broker.port)}, metrics 127.0.0.1:{port(broker.metrics_port)}, "
        f"weights {weights.bind}:{port(weights.port)}"
    )


def _memory(recipe: Recipe, shape: ModelShape) -> str:
    device: Device = "gpu" if visible_gpus() or meant_for_gpus(recipe) else "cpu"
    size = smallest_gpu_bytes(visible_gpus()) if device == "gpu" else None
    plans = {
        "learner rank": learner_memory(recipe, shape, device),
        "actor rank": actor_memory(recipe, shape, device, size),
    }
    lines = []
    for name, plan in plans.items():
        parts = {**plan.terms, "libraries": plan.imports}
        terms = ", ".join(f"{term} {size / MIB:,.0f}" for term, size in parts.items() if size >= MIB)
        lines.append(f"{name} about {plan.total / MIB:,.0f} MiB ({terms})")
    if device == "gpu":
        lines.append("(formulas measured on CPU; the GPU's constants are assumed)")
    return "\n".join(lines)
