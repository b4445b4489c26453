"""Synchronous training as one plain loop: sample, train, copy the weights, again. No broker, no actor, no push.

    python -m tests.e2e.synchronous_loop RECIPE.json OUT.json

OUT.json holds, for each version, the checksum of each parameter.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from broker.order import epoch_order
from common.messages import Batch, GroupId
from common.model_files import read_shape
from common.process import leave
from common.recipe.schema import Recipe
from common.weights.checksum import checksum
from learner.engine import Engine
from learner.model import load_policy
from learner.objective import objective_of
from learner.prepare import Preparation
from learner.ranks import leave_ranks, start_ranks
from learner.snapshot import take_snapshot
from learner.step import PolicyStep
from tests.e2e.sampling_policy import Sampler


def batch_of(recipe: Recipe, sampler: Sampler, questions: int, step: int):
    """The groups of a step, in the order of the questions; those of equal rewards are counted and not sent."""
    wanted = recipe.batch.questions_per_step
    headers, payloads, equal = [], {}, []
    for place in range(step * wanted, (step + 1) * wanted):
        epoch, position = divmod(place, questions)
        key = GroupId(epoch, int(epoch_order(recipe.run.seed, epoch, questions)[position]))
        header, payload = sampler.group(key, lease=1, actor="loop", era=1, version=step)
        rewards = [response.reward for response in header.responses]
        if min(rewards) == max(rewards):
            equal.append(rewards[0])
            continue
        headers.append(header)
        payloads[key] = payload
    batch = Batch(
        step=step,
        ready=True,
        groups=headers,
        scheduled=wanted,
        filtered=len(equal),
        filtered_rewards=equal,
    )
    return batch, payloads


def main() -> None:
    """Train and write the checksums."""
    recipe = Recipe.model_validate_json(Path(sys.argv[1]).read_text())
    questions = len(Path(recipe.data.train).read_text().splitlines())
    ranks, objective = start_ranks(120.0), objective_of(recipe)
    engine = Engine(
        load_policy(recipe, value_head=False), recipe, ranks, recipe.run.steps * recipe.batch.optimizer_steps
    )
    step_of = PolicyStep(engine, objective)
    work_of = Preparation(recipe, objective, read_shape(recipe.model.path), ranks.rank, ranks.world, None)
    sampler, versions, rewards = Sampler(recipe), [], []
    for step in range(recipe.run.steps + 1):
        weights = dict(take_snapshot(engine.deepspeed).tensors())
        versions.append({name: checksum(tensor) for name, tensor in weights.items()})
        if step == recipe.run.steps:
            break
        sampler.load(weights.items())
        batch, payloads = batch_of(recipe, sampler, questions, step)
        rewards.append([response.reward for header in batch.groups for response in header.responses])
        wanted = work_of.wanted(batch)
        work = work_of.prepare(batch, {key: payloads[key] for key in wanted})
        step_of.run(work.updates, work.responses.rewards, work.first_pass)
    Path(sys.argv[2]).write_text(json.dumps({"versions": versions, "rewards": rewards}))
    engine.close()
    leave_ranks(ranks)


if __name__ == "__main__":
    main()
    leave(0)
