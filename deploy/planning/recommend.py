"""How many actors for a learner: simulate the splits that can be best, and choose.

Invariant: what is recommended was simulated; among splits within `CLOSE` of the fastest, the one with the fewest
GPUs, then the one with the fewest actors, wins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from common.recipe.schema import Recipe
from deploy.planning.rates import Rates
from deploy.planning.simulate import Outcome, simulate
from deploy.planning.workload import Workload

CLOSE = 0.03  # of the fastest step
TRIED = 7  # splits simulated for one number of GPUs, before the smaller ones
STEPS, WARM_UP = 14, 4  # simulated for each candidate, beside the versions that may be in flight


@dataclass(frozen=True)
class Split:
    """A way to share out GPUs: learner ranks and actors; `outcome` is what it would do."""

    ranks: int
    actors: int
    gpus: int
    outcome: Outcome

    def hours(self, steps: int) -> float:
        """Hours for so many steps."""
        return steps * self.outcome.step_s / 3600


RatesOf = Callable[[int], Rates]  # of a learner with so many ranks


def simulate_split(
    recipe: Recipe, rates: Rates, workload: Workload, ranks: int, actors: int, seed: int
) -> Split:
    """Simulate one split."""
    bound = recipe.batch.max_staleness
    steps = min(recipe.run.steps, STEPS + 2 * bound)
    outcome = simulate(
        recipe,
        rates,
        workload,
        actors=actors,
        steps=steps,
        warm_up=min(WARM_UP + bound, steps // 2),
        seed=seed,
    )
    return Split(ranks, actors, ranks + actors * recipe.actor.tensor_parallel, outcome)


def best(splits: Iterable[Split]) -> Split:
    """The fastest; among those about as fast, the smallest."""
    splits = list(splits)
    fastest = min(split.outcome.step_s for split in splits)
    close = [split for split in splits if split.outcome.step_s <= (1 + CLOSE) * fastest]
    return min(close, key=lambda split: (split.gpus, split.actors, split.outcome.step_s))


def best_of_gpus(
    recipe: Recipe, rates_of: RatesOf, workload: Workload, gpus: int, *, fewest_ranks: int = 1, seed: int = 0
) -> Split | None:
    """The best split of at most `gpus` GPUs; None where they are too few for a learner and an actor.

    Where the batch is too small for so many, GPUs are left over: halves of the actors, then of the ranks, are given
    back as long as the step stays about as fast.
    """

    def tried(ranks: int, actors: int) -> Split:
        return simulate_split(recipe, rates_of(ranks), workload, ranks, actors, seed)

    ways = candidates(recipe, rates_of(1), workload, gpus, fewest_ranks)
    if not ways:
        return None
    found = [best(tried(*way) for way in ways)]
    while found[-1].actors > 1 and found[-1] is best(found):
        found.append(tried(found[-1].ranks, found[-1].actors // 2))
    found = [best(found)]
    while found[-1].ranks // 2 >= fewest_ranks and found[-1] is best(found):
        found.append(tried(found[-1].ranks // 2, found[-1].actors))
    return best(found)


def candidates(
    recipe: Recipe, one_rank: Rates, workload: Workload, gpus: int, fewest_ranks: int = 1
) -> list[tuple[int, int]]:
    """(ranks, actors) worth a simulation: all where there are few, else around the balance of work; more ranks than
    an optimizer step has responses would have nothing to do."""
    width = recipe.actor.tensor_parallel
    most = min(gpus - width, recipe.responses_per_optimizer_step)
    if most < fewest_ranks:
        return []
    ranks = set(range(fewest_ranks, most + 1))
    if len(ranks) > TRIED:
        balanced = gpus * _learner_share(recipe, one_rank, workload)
        around = (math.ceil(balanced * 2 ** (k / 2)) for k in range(-TRIED // 2, TRIED // 2 + 1))
        ranks = {min(most, max(fewest_ranks, rank)) for rank in around}
    return [(rank, (gpus - rank) // width) for rank in sorted(ranks)]


def _learner_share(recipe: Recipe, rates: Rates, workload: Workload) -> float:
    """Share of GPUs at which learner and actors would take equally long, if neither ever waited."""
    mean, slots = workload.lengths.mean, recipe.actor.max_sequences
    learn = rates.train_token_s * (mean + workload.prompt_tokens) * (1 - workload.filtered_share)
    act = mean * recipe.actor.tensor_parallel / rates.actor_rate(slots)
    return learn / (learn + act)


def actors_for_learner(
    recipe: Recipe, rates: Rates, workload: Workload, counts: Iterable[int], seed: int
) -> list[Split]:
    """One learner as it is, with so many actors."""
    return [simulate_split(recipe, rates, workload, recipe.learner.ranks, count, seed) for count in counts]
