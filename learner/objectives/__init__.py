"""The mathematics of the learner, as pure functions of tensors.

Shapes. A micro-batch has T response tokens laid end to end in 1-D tensors, with `sequence` [T] naming the local
response of each: no padding, no masks to average over. Groups are [groups, G]. Log-probabilities are in nats,
float32, of the distribution that was sampled from (temperature applied).

How a learner uses it, for one batch of complete groups:

    objective = preset("dr_grpo", normaliser=3000)
    advantages = objective.advantages(rewards, group_ids).flatten()         # [groups, G], before any split
    for samples in packing.optimizer_steps(len(responses), steps, seed):
        size = StepSize(responses=scheduled, tokens=int(response_lengths[samples].sum()))
        weights = objective.weights(response_lengths, size)                 # one number per response
        limit = objective.step_limit(log_rho)                               # None unless m2po
        plan = packing.plan_micro_batches(lengths, ranks=W, token_budget=B, samples=samples)
        for row in plan[rank]:                                              # equally many on every rank
            batch = packing.pack(row, prompts, responses)
            logp, entropy, values = policy(batch, temperature)              # logprobs.PolicyModel
            tokens = ResponseTokens(
                sequence=batch.sequence, count=len(batch.samples),
                weights=batch.per_token(weights), advantages=batch.per_token(advantages),
                behaviour_logp=batch.concatenate(recorded_logps, torch.float32),
            )
            loss, metrics = objective.token_loss(logp, tokens, entropy=entropy, values=values, step_limit=limit)
            backward(loss)                                                  # a sum: never divide by micro-batches
            total = total + metrics                                         # TokenMetrics; sums and maxima

`scheduled` is the number of responses the recipe schedules for the optimizer step, filtered groups included.
`total.sums` and `total.maxima` are reduced over ranks with SUM and MAX; `total.summary()` then gives the means.
"""

from learner.objectives.advantages import group_advantages, zero_variance
from learner.objectives.aggregation import StepSize, sequence_weights
from learner.objectives.metrics import TokenMetrics
from learner.objectives.objective import Objective, ResponseTokens
from learner.objectives.presets import preset

__all__ = [
    "Objective",
    "ResponseTokens",
    "StepSize",
    "TokenMetrics",
    "group_advantages",
    "preset",
    "sequence_weights",
    "zero_variance",
]
