"""The composed objective: one gradient however the step is split, every preset, and settings refused in words."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args, get_origin

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from common.errors import UserError
from common.recipe import load_recipe, resolved_toml
from common.recipe.load import RECIPES
from common.recipe.presets import PRESETS
from common.recipe.schema import AlgorithmSection, Recipe
from learner.objective import objective_of
from learner.objectives import Objective, ResponseTokens, StepSize, TokenMetrics, preset
from learner.objectives.aggregation import AGGREGATIONS
from learner.objectives.corrections import CORRECTIONS
from learner.objectives.kl import KL_ESTIMATORS
from learner.objectives.losses import LOSSES
from learner.objectives.objective import ADVANTAGES, ANCHORS, BOUNDS, OF_GAE
from learner.packing import pack, plan_micro_batches

NAMES = sorted(PRESETS)


class Step:
    """A random optimizer step of n responses with everything that any objective may ask for."""

    FIELDS = ("behaviour_logp", "prox_logp", "ref_logp", "old_values", "returns")

    def __init__(self, lengths: list[int], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(length: int, mean: float = 0.0) -> torch.Tensor:
            return mean + 0.4 * torch.randn(length, dtype=torch.float64, generator=generator)

        self.lengths = lengths
        self.behaviour_logp = [draw(n, -2.0) for n in lengths]
        self.prox_logp = [row + draw(len(row)) for row in self.behaviour_logp]
        self.logp = [(row + draw(len(row))).requires_grad_() for row in self.prox_logp]
        self.ref_logp = [row + draw(len(row)) for row in self.behaviour_logp]
        self.old_values, self.returns, self.entropy = ([draw(n) for n in lengths] for _ in range(3))
        self.values = [(row + draw(len(row))).requires_grad_() for row in self.old_values]
        self.advantages = draw(len(lengths))
        self.staleness = torch.randint(0, 12, (len(lengths),), generator=generator)
        self.trained = torch.rand(len(lengths), generator=generator) > 0.2

    def loss(self, objective: Objective, rows: list[list[int]]) -> tuple[torch.Tensor, TokenMetrics]:
        """Sum over micro-batches `rows`."""
        weights = objective.weights(torch.tensor(self.lengths), StepSize(20, sum(self.lengths))).double()
        trained = torch.repeat_interleave(self.trained, torch.tensor(self.lengths))
        rho = (torch.cat(self.prox_logp) - torch.cat(self.behaviour_logp))[trained]
        limit = objective.step_limit(rho)
        total, metrics = torch.zeros((), dtype=torch.float64), TokenMetrics.zero()
        for row in rows:
            batch = pack(row, [[0]] * len(self.lengths), [[0] * n for n in self.lengths])
            packed = {name: batch.concatenate(getattr(self, name), torch.float64) for name in self.FIELDS}
            tokens = ResponseTokens(
                sequence=batch.sequence,
                count=len(row),
                weights=batch.per_token(weights),
                advantages=batch.per_token(self.advantages),
                staleness=batch.per_token(self.staleness),
                mask=batch.per_token(self.trained),
                **packed,
            )
            part, more = objective.token_loss(
                batch.concatenate(self.logp, torch.float64),
                tokens,
                entropy=batch.concatenate(self.entropy, torch.float64),
                values=batch.concatenate(self.values, torch.float64),
                step_limit=limit,
            )
            total, metrics = total + part, metrics + more
        return total, metrics

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        leaves = [*self.logp, *self.values]
        parts = torch.autograd.grad(loss, leaves, allow_unused=True)
        return torch.cat(
            [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, parts, strict=True)]
        ).detach()


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    name=st.sampled_from(NAMES),
    aggregation=st.sampled_from(["constant", "response_mean", "token_mean"]),
    beta=st.sampled_from([0.0, 0.1]),
    budget=st.integers(1, 30),
    ranks=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_loss_gradient_and_metrics_do_not_depend_on_the_split(
    lengths, name, aggregation, beta, budget, ranks, seed
):
    step = Step(lengths, seed)
    objective = preset(name, aggregation=aggregation, kl_beta=beta, normaliser=50)
    plan = plan_micro_batches([n + 1 for n in lengths], ranks=ranks, token_budget=budget)
    whole, all_metrics = step.loss(objective, [list(range(len(lengths)))])
    split, metrics = step.loss(objective, [row for rank in plan for row in rank])
    torch.testing.assert_close(split, whole, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(step.gradient(split), step.gradient(whole), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(metrics.sums, all_metrics.sums, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(metrics.maxima, all_metrics.maxima)


@pytest.mark.parametrize("name", NAMES)
def test_masked_responses_change_nothing_but_are_still_counted_in_n(name):
    step, objective = Step([4, 3, 5], 1), preset(name)
    step.trained = torch.tensor([True, False, True])
    with_masked, metrics = step.loss(objective, [[0, 1, 2]])
    gradient = step.gradient(with_masked)
    for junk in (step.logp[1].data, step.behaviour_logp[1], step.returns[1], step.entropy[1]):
        junk.fill_(math.nan)
    with_junk, junk_metrics = step.loss(objective, [[0, 1, 2]])
    assert torch.equal(with_masked, with_junk)
    assert torch.equal(step.gradient(with_junk), gradient)
    assert torch.equal(junk_metrics.sums, metrics.sums)
    assert metrics.summary()["tokens"] == 9
    without, _ = step.loss(objective, [[0, 2]])
    torch.testing.assert_close(without, with_masked)


@pytest.mark.parametrize("name", NAMES)
def test_filler_is_an_exact_zero_with_a_gradient(name):
    objective = preset(name, kl_beta=0.1)
    empty = torch.zeros(0, requires_grad=True)
    fields = {field: torch.zeros(0) for field in ("prox_logp", "ref_logp", "old_values", "returns")}
    tokens = ResponseTokens(
        sequence=torch.zeros(0, dtype=torch.int64),
        count=0,
        weights=torch.zeros(0),
        advantages=torch.zeros(0),
        behaviour_logp=torch.zeros(0),
        **fields,
    )
    loss, metrics = objective.token_loss(empty, tokens, values=empty, step_limit=1.0)
    loss.backward()
    assert loss.item() == 0.0
    assert metrics.summary() == {}


def simple_tokens(count: int = 2, **fields) -> ResponseTokens:
    return ResponseTokens(
        sequence=torch.arange(count),
        count=count,
        weights=torch.ones(count),
        advantages=torch.ones(count),
        behaviour_logp=torch.full((count,), -1.0),
        **fields,
    )


def test_missing_proximal_policy_means_the_current_one():
    objective = preset("dr_grpo_tis")
    logp = torch.tensor([-1.2, -0.5], requires_grad=True)
    implicit, _ = objective.token_loss(logp, simple_tokens())
    explicit, _ = objective.token_loss(logp, simple_tokens(prox_logp=logp.detach()))
    assert torch.equal(implicit, explicit)
    (gradient,) = torch.autograd.grad(implicit, logp)
    torch.testing.assert_close(gradient, -torch.tensor([-0.2, 0.5]).exp())  # ratio 1 × ρ


def test_on_policy_all_ratio_losses_agree_with_reinforce():
    """At π = μ every surrogate has the policy gradient, whatever its clip."""
    logp = torch.full((2,), -1.0, requires_grad=True)
    for name in (
        "dr_grpo",
        "dr_grpo_cispo",
        "dr_grpo_gspo",
        "dr_grpo_tis",
        "dr_grpo_icepop",
        "dr_grpo_geometric_mask",
    ):
        loss, _ = preset(name).token_loss(logp, simple_tokens(prox_logp=torch.full((2,), -1.0)))
        torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], torch.tensor([-1.0, -1.0]))


def test_missing_pieces_are_named():
    logp = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match="step_limit"):
        preset("dr_grpo_m2po").token_loss(logp, simple_tokens())
    with pytest.raises(ValueError, match="ref_logp"):
        preset("dr_grpo", kl_beta=0.1).token_loss(logp, simple_tokens())
    with pytest.raises(ValueError, match="gae"):
        preset("ppo").advantages(torch.zeros(1, 2))


def test_defaults_are_the_papers():
    objective = preset("dr_grpo")
    assert objective == Objective()
    assert objective.clip == (0.2, 0.2)
    assert objective.normaliser == 3000
    assert (objective.kl_beta, objective.kl_in_reward, objective.gamma, objective.lam) == (0, 0, 1, 1)
    assert (objective.value_clip, objective.value_coefficient) == (0.2, 1.0)
    assert not objective.needs_reference
    assert preset("dr_grpo", kl_in_reward=0.01).needs_reference


@pytest.mark.parametrize(
    ("name", "clip", "bounds"),
    [
        ("dr_grpo_tis", (0.2, 0.2), (0.0, 2.0)),
        ("dr_grpo_icepop", (0.2, 0.2), (0.5, 5.0)),
        ("dr_grpo_cispo", (1.0, 4.0), (0.0, 0.0)),  # [0, 5]
        ("dr_grpo_gspo", (3e-4, 4e-4), (0.0, 0.0)),
    ],
)
def test_published_bounds_are_the_defaults(name, clip, bounds):
    objective = preset(name)
    assert (objective.clip, objective.correction_bounds) == (clip, bounds)
    assert preset("dr_grpo_m2po").second_moment == 0.04


@pytest.mark.parametrize(
    ("name", "advantage", "aggregation"),
    [
        ("dr_grpo", "dr_grpo", "constant"),
        ("grpo", "grpo", "response_mean"),
        ("wo_len", "grpo", "constant"),
        ("wo_std", "dr_grpo", "response_mean"),
    ],
)
def test_ablations_are_the_four_corners(name, advantage, aggregation):
    objective = preset(name)
    assert (objective.advantage, objective.aggregation) == (advantage, aggregation)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"advantage": "x"}, "algorithm.advantage: .*dr_grpo, grpo, rloo, none, gae"),
        ({"loss": "x"}, "algorithm.loss: .*ppo_clip, cispo, gspo, reinforce"),
        ({"anchor": "behaviour"}, "algorithm.anchor: .*behavior, proximal"),
        ({"correction": "x", "anchor": "proximal"}, "algorithm.correction: .*tis"),
        ({"aggregation": "x"}, "algorithm.aggregation: .*constant"),
        ({"kl_estimator": "x"}, "algorithm.kl_estimator: .*k2, k3"),
        ({"correction": "tis"}, "algorithm.correction: .*proximal"),
        ({"dual_clip": 1.1}, r"algorithm.dual_clip: must lie above .* 1\.2"),
        ({"normaliser": 0}, "algorithm.normaliser"),
        ({"clip_low": 1.5}, "algorithm.clip_low"),
        ({"clip_high": -0.1}, "algorithm.clip_high"),
        ({"kl_beta": math.nan}, "algorithm.kl_beta"),
        ({"gamma": 1.1}, "algorithm.gamma"),
        ({"value_clip": -1.0}, "algorithm.value_clip"),
        ({"anchor": "proximal", "correction": "icepop", "correction_floor": 9.0}, "algorithm.correction_cap"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(UserError, match=message):
        Objective(**settings)


@pytest.mark.parametrize(
    ("settings", "because"),
    [
        ({"loss": "reinforce", "clip_low": 0.1}, "loss = 'reinforce'"),
        ({"loss": "reinforce", "clip_high": 0.1}, "loss = 'reinforce'"),
        ({"loss": "gspo", "dual_clip": 3.0}, "loss = 'gspo'"),
        ({"correction_cap": 2.0}, "correction = 'none'"),
        ({"anchor": "proximal", "correction": "m2po", "correction_cap": 2.0}, "correction = 'm2po'"),
        ({"anchor": "proximal", "correction": "m2po", "correction_floor": 0.0}, "correction = 'm2po'"),
        ({"second_moment": 0.1}, "correction = 'none'"),
        ({"kl_estimator": "k2", "kl_in_reward": 0.1}, "kl_beta = 0"),
        ({"gamma": 0.9}, "advantage = 'dr_grpo'"),
        ({"lam": 0.9}, "advantage = 'dr_grpo'"),
        ({"value_clip": 0.5}, "advantage = 'dr_grpo'"),
        ({"value_coefficient": 0.5}, "advantage = 'dr_grpo'"),
        ({"aggregation": "token_mean", "normaliser": 50.0}, "aggregation = 'token_mean'"),
    ],
)
def test_a_setting_that_nothing_reads_is_refused(settings, because):
    unread = {
        "clip_low",
        "clip_high",
        "dual_clip",
        *BOUNDS,
        "second_moment",
        "kl_estimator",
        *OF_GAE,
        "normaliser",
    }
    (name,) = unread & settings.keys()
    recipe = Recipe(model={"path": "m"}, data={"train": "demo"}, algorithm=settings)
    with pytest.raises(
        UserError, match=f"algorithm.{name}: has no effect with algorithm.{because}: leave it out"
    ):
        objective_of(recipe)


@pytest.mark.parametrize("setting", ["gamma", "lam"])
def test_a_recipe_refuses_a_discount_above_one(setting):
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        AlgorithmSection(preset="ppo", **{setting: 1.5})


def test_every_shipped_recipe_has_an_objective():
    shipped = [path for path in RECIPES.glob("*.toml") if not path.stem.startswith(("zoo-", "pretrain-"))]
    assert len(shipped) > 20
    for path in shipped:
        objective_of(load_recipe(path))


def test_unknown_preset_lists_the_valid_ones():
    with pytest.raises(UserError, match="dr_grpo, grpo, wo_len, wo_std, rloo, ppo, reinforce"):
        preset("drgrpo")


@pytest.mark.parametrize(
    ("setting", "valid"),
    [
        ("preset", tuple(PRESETS)),
        ("advantage", ADVANTAGES),
        ("loss", LOSSES),
        ("anchor", ANCHORS),
        ("correction", CORRECTIONS),
        ("aggregation", AGGREGATIONS),
        ("kl_estimator", KL_ESTIMATORS),
    ],
)
def test_a_recipe_may_name_exactly_what_exists(setting, valid):
    """The recipe cannot import torch, so it lists the names once more."""
    annotation = AlgorithmSection.model_fields[setting].annotation
    literals = [part for part in (annotation, *get_args(annotation)) if get_origin(part) is Literal]
    assert sorted(get_args(literals[0])) == sorted(valid)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_gets_the_preset_that_it_names_also_when_read_back(name, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        f"""
        [model]
        path = "m"
        [data]
        train = "demo"
        [algorithm]
        preset = "{name}"
        """
    )
    recipe = load_recipe(path)
    assert objective_of(recipe) == preset(name)
    path.write_text(resolved_toml(recipe))
    assert objective_of(load_recipe(path)) == preset(name)


CHANGED = [(name, {}) for name in NAMES] + [
    ("dr_grpo", {"aggregation": "token_mean"}),
    ("dr_grpo", {"anchor": "proximal", "correction": "m2po"}),
    ("dr_grpo_tis", {"advantage": "none"}),
]


@pytest.mark.parametrize(("name", "changes"), CHANGED)
def test_groups_of_equal_rewards_are_left_out_only_where_nothing_changes(name, changes, tmp_path):
    path = tmp_path / "run.toml"
    lines = [f'{key} = "{value}"' for key, value in {"preset": name, **changes}.items()]
    path.write_text('[model]\npath = "m"\n[data]\ntrain = "demo"\n[algorithm]\n' + "\n".join(lines))
    recipe = load_recipe(path)
    objective = objective_of(recipe)
    lengths, log_rho = (
        torch.tensor([5, 9, 4, 6]),
        torch.tensor([0.3, -0.4, 0.01, 0.02]),
    )  # the last two are equal
    silent = not objective.needs_values and not objective.advantages(torch.ones(1, 2)).any()
    alone = objective.weights(lengths[:2], StepSize(4, 14)), objective.step_limit(log_rho[:2])
    beside = objective.weights(lengths, StepSize(4, 24))[:2], objective.step_limit(log_rho)
    same = torch.equal(alone[0], beside[0]) and alone[1] == beside[1]
    assert recipe.equal_rewards == ("count" if silent and same else "train")


def test_tokens_move_as_a_whole():
    tokens = simple_tokens(mask=torch.tensor([True, False]))
    moved = tokens.to("meta")
    tensors = [getattr(moved, f.name) for f in dataclasses.fields(moved)]
    assert {t.device.type for t in tensors if isinstance(t, torch.Tensor)} == {"meta"}
    assert moved.prox_logp is None
