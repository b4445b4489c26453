"""One rank that carries out single steps with DeepSpeed; started by tests, alone or under torchrun.

    python update_worker.py CASES.json OUT.pt

A case with a `batch` is one step; OUT.pt holds the policy's weights after it, the number of micro-batches of rank
0 and the gradient norms. A case with `rewards` is a run of six steps, straight and interrupted; OUT.pt holds a
digest of the weights and the learning rates of both. Single steps use SGD, because Adam's first step is close to the sign of the gradient: it
would hide a wrong scale and blow up rounding.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace

from common.model_files import ModelShape
from common.process import leave
from common.recipe.schema import LearnerSection, Recipe
from learner.checkpoint import Checkpoints
from learner.engine import Engine
from learner.logprobs import PolicyModel
from learner.model import DTYPES, with_adapters
from learner.objective import objective_of
from learner.prepare import Preparation, Work
from learner.ranks import Ranks, leave_ranks, start_ranks
from learner.snapshot import take_snapshot
from learner.step import PolicyStep
from tests.learner.tiny import VOCABULARY, made_up_batch, tiny_lm

SHAPE = ModelShape(2, 32, 64, 2, 1, 16, VOCABULARY, True, True, 512)


def sgd(policy: PolicyModel, settings: LearnerSection) -> torch.optim.Optimizer:
    """Plain gradient descent: the update is the gradient."""
    return torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=settings.lr)


def prepared(recipe: Recipe, ranks: Ranks, batch: dict[str, Any], sent: int | None) -> Work:
    """The batch as the feed would hand it to this rank; `sent` keeps only the first groups, the rest filtered."""
    made, payloads = made_up_batch(**batch)
    if sent is not None:
        groups = made.groups[:sent]
        made = replace(made, groups=groups, filtered=len(made.groups) - sent)
    work = Preparation(recipe, objective_of(recipe), SHAPE, ranks.rank, ranks.world, None)
    wanted = work.wanted(made)
    return work.prepare(made, {group: payloads[group] for group in wanted})


def run_case(ranks: Ranks, case: dict[str, Any]) -> dict[str, Any]:
    """Carry out one step on a fresh policy."""
    recipe = Recipe.model_validate(case["recipe"])
    objective = objective_of(recipe)
    lm = tiny_lm()
    if recipe.learner.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(2)  # of adapters
    policy = PolicyModel(with_adapters(lm, recipe) if recipe.lora else lm, value_head=objective.needs_values)
    engine = Engine(policy, recipe, ranks, 10, optimizer=sgd)
    reference = PolicyModel(tiny_lm(seed=1)).eval() if objective.needs_reference else None
    work = prepared(recipe, ranks, case["batch"], case.get("sent"))
    result = PolicyStep(engine, objective, reference).run(
        work.updates, work.responses.rewards, work.first_pass
    )
    snapshot = take_snapshot(engine.deepspeed)
    outcome = {
        "weights": dict(snapshot.tensors()) if snapshot is not None else {},
        "rows": [len(rows) for rows in work.updates],
        "grad_norms": [update.grad_norm for update in result.updates],
        "metrics": result.tokens.summary(),
        "mismatch": result.mismatch.summary(),
    }
    engine.close()
    return outcome


def run_steps(engine: Engine, recipe: Recipe, rewards: list[list[float]], steps: range) -> list[float]:
    """Train on made-up batches with AdamW; returns the learning rates."""
    step = PolicyStep(engine, objective_of(recipe))
    rates = []
    for number in steps:
        work = prepared(recipe, engine.ranks, {"rewards": rewards, "seed": number, "step": number}, None)
        result = step.run(work.updates, work.responses.rewards, work.first_pass)
        rates += [update.lr for update in result.updates]
    return rates


def digest(engine: Engine) -> str | None:
    """SHA-256 over the weights; None on all ranks but 0."""
    snapshot = take_snapshot(engine.deepspeed)
    if snapshot is None:
        return None
    parts = (tensor.contiguous().view(torch.uint8).numpy().tobytes() for _, tensor in snapshot.tensors())
    return hashlib.sha256(b"".join(parts)).hexdigest()


def run_resume(ranks: Ranks, case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Six steps straight; three, a checkpoint, and three more in a new engine from other weights."""
    recipe = Recipe.model_validate(case["recipe"])
    dtype = DTYPES[recipe.model.dtype]
    straight = Engine(PolicyModel(tiny_lm().to(dtype)), recipe, ranks, 12)
    rates = run_steps(straight, recipe, case["rewards"], range(3))
    checkpoints = Checkpoints(folder, recipe, ranks)
    assert checkpoints.save(straight, 3, lambda _: None) is not None
    rates += run_steps(straight, recipe, case["rewards"], range(3, 6))
    resumed = Engine(PolicyModel(tiny_lm(seed=5).to(dtype)), recipe, ranks, 12)
    step = checkpoints.load(resumed, 3)
    rates_resumed = rates[:6] + run_steps(resumed, recipe, case["rewards"], range(step, 6))
    outcome = {
        "step": step,
        "straight": {"weights": digest(straight), "rates": rates},
        "resumed": {"weights": digest(resumed), "rates": rates_resumed},
    }
    straight.close()
    resumed.close()
    return outcome


def main() -> None:
    """Run all cases, save on rank 0."""
    cases = json.loads(Path(sys.argv[1]).read_text())
    ranks = start_ranks(120.0)
    # What rank 0 says is heard by all, whatever the others hold in hand.
    assert ranks.broadcast(b"x" * (1 + ranks.rank), ranks.main) == b"x"
    assert ranks.broadcast(b"" if ranks.leads else None, ranks.feed) == b""
    held = torch.arange(3.0 - ranks.rank)
    assert [len(part) for part in ranks.gather(held)] == [3, 2][: ranks.world]
    folder = Path(sys.argv[2]).parent
    outcomes = {
        name: run_resume(ranks, case, folder / name) if "rewards" in case else run_case(ranks, case)
        for name, case in cases.items()
    }
    if ranks.leads:
        torch.save(outcomes, sys.argv[2])
    leave_ranks(ranks)


if __name__ == "__main__":
    main()
    leave(0)
