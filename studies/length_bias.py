"""Figure 4, Listing 1, Table 2: which objectives make long wrong answers cheap, and what that does to length."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from learner.objectives import preset
from learner.objectives.audit import length_bias_audit
from studies import tabular
from studies.figures import COLOURS, NAMES, band, grid
from studies.study import Budget, Setting, Study, Table, Unit
from studies.verdict import Expectation, Row, mean, per_seed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALGORITHMS = ("grpo", "wo_std", "wo_len", "dr_grpo")
TABLE_2 = ("trl 07cfe16", "OpenRLHF", "verl c6dc8b7", "SimpleRL-Zero", "Open-Reasoner-Zero")
LAST = 40  # iterations that count as the end of a run
_ITERATIONS = {Budget.SECONDS: 60, Budget.MINIATURE: 400, Budget.FULL: 400}


def _audit(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["kind"] == "audit"]


def _table_2(rows: Sequence[Row]) -> list[float]:
    return [float(bool(row["biases"])) for row in _audit(rows) if row["name"].startswith(TABLE_2)]


def _constant(rows: Sequence[Row]) -> list[float]:
    found = [row for row in _audit(rows) if row["name"] == "slipstream constant"]
    return [
        abs(value)
        for row in found
        for value in (row["own_length"], row["other_length"], row["splitting"] - 1)
    ]


def final(rows: Sequence[Row], algorithm: str, key: str) -> float:
    """Mean of a curve's last iterations in one seed's rows."""
    curve = [row for row in rows if row.get("algorithm") == algorithm and row["kind"] == "curve"]
    last = max((row["step"] for row in curve), default=0)
    return mean([row[key] for row in curve if row["step"] > last - LAST])


def _ratio(rows: Sequence[Row], top: str, bottom: str) -> list[float]:
    key = "length_incorrect"
    return per_seed(rows, lambda seed: final(seed, top, key) / final(seed, bottom, key))


class LengthBias(Study):
    """See the module."""

    name = "length-bias"
    shows = "Figure 4, Listing 1, Table 2"
    paper = (
        "GRPO divides a response's loss by its length and an advantage by the standard deviation of its group: "
        "short right answers are pushed up more, long wrong ones are pushed down less, and questions that are too "
        "easy or too hard weigh more. Five public frameworks have the length bias in their PPO loss."
    )
    miniature = (
        "The audit runs each aggregation and measures gradients. The training runs are on a tabular policy (a "
        f"method, then filler until it stops; budget {tabular.BUDGET} tokens) with the learner's own objectives."
    )
    default_seeds = 5
    expectations = (
        Expectation(
            "Table 2: share of the five frameworks whose loss is biased",
            _table_2,
            1.0,
            unit="frameworks",
            complete=True,
        ),
        Expectation(
            "`constant`: change of a token's gradient with lengths",
            _constant,
            1e-6,
            "at most",
            "probes",
            complete=True,
        ),
        Expectation(
            "length of wrong responses at the end, GRPO / Dr. GRPO",
            lambda rows: _ratio(rows, "grpo", "dr_grpo"),
            2.0,
        ),
        Expectation(
            "length of right responses at the end, Dr. GRPO / GRPO",
            lambda rows: per_seed(
                rows,
                lambda seed: final(seed, "dr_grpo", "length_correct") / final(seed, "grpo", "length_correct"),
            ),
            1.2,
        ),
        Expectation(
            "reward at the end, |GRPO - Dr. GRPO|",
            lambda rows: per_seed(
                rows, lambda seed: abs(final(seed, "grpo", "reward") - final(seed, "dr_grpo", "reward"))
            ),
            0.03,
            "at most",
        ),
        Expectation(
            "length of wrong responses at the end, with the length term / without it (std left out of both)",
            lambda rows: _ratio(rows, "wo_std", "dr_grpo"),
            2.0,
        ),
    )

    def units(self, setting: Setting) -> list[Unit]:
        runs = [
            Unit(f"{algorithm}/seed-{seed}", {"algorithm": algorithm, "seed": seed})
            for seed in setting.seeds
            for algorithm in ALGORITHMS
        ]
        return [Unit("audit"), Unit("weights"), *runs]

    def run(self, unit: Unit, setting: Setting) -> list[Row]:
        if unit.key == "audit":
            return _audit_rows()
        if unit.key == "weights":
            return _weight_rows()
        algorithm, seed = unit.arguments["algorithm"], unit.arguments["seed"]
        curve = tabular.train(algorithm, seed, iterations=_ITERATIONS[setting.budget])
        return [{"kind": "curve", "algorithm": algorithm, "seed": seed, **row} for row in curve]

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        return [_audit_table(rows), _toy_table(rows)]

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        axes = grid(figure, 2, 3)
        weights = [row for row in rows if row["kind"] == "weights"]
        for axis, algorithm in zip(axes, ("grpo", "dr_grpo"), strict=False):
            _draw_weights(axis, [row for row in weights if row["algorithm"] == algorithm])
            axis.set_title(f"{NAMES[algorithm]}: weight of each token")
        curves = [row for row in rows if row["kind"] == "curve"]
        titles = {
            "reward": "reward",
            "length": "response length",
            "length_correct": "length, right",
            "length_incorrect": "length, wrong",
        }
        for axis, (key, title) in zip(axes[2:], titles.items(), strict=True):
            for name in ALGORITHMS:
                chosen = [row for row in curves if row["algorithm"] == name]
                band(axis, chosen, "step", key, smooth=15, color=COLOURS[name], label=NAMES[name])
            unit = "reward" if key == "reward" else "tokens"
            axis.set(title=f"tabular policy: {title}", xlabel="iteration", ylabel=unit)
        axes[2].legend(frameon=False, fontsize="small")


def _audit_rows() -> list[Row]:
    return [
        {
            "kind": "audit",
            "name": row.name,
            "formula": row.formula,
            "own_length": row.own_length,
            "other_length": row.other_length,
            "splitting": row.splitting,
            "biases": list(row.biases),
        }
        for row in length_bias_audit()
    ]


def _weight_rows() -> list[Row]:
    """Two questions of an untrained policy, G responses each: advantage × weight of a token (Figure 4)."""
    generator = torch.Generator().manual_seed(0)
    rollout = tabular.TabularPolicy(2).sample(generator)
    while not _tells_apart(rollout.rewards):
        rollout = tabular.TabularPolicy(2).sample(generator)
    rows: list[Row] = []
    for algorithm in ("grpo", "dr_grpo"):
        objective = preset(algorithm, normaliser=tabular.BUDGET)
        advantages, weights = tabular.token_weights(objective, rollout)
        for index, (advantage, weight) in enumerate(zip(advantages, weights, strict=True)):
            rows.append(
                {
                    "kind": "weights",
                    "algorithm": algorithm,
                    "question": index // tabular.GROUP,
                    "response": index % tabular.GROUP,
                    "length": int(rollout.lengths[index]),
                    "right": bool(rollout.right[index]),
                    "advantage": float(advantage),
                    "token": float(advantage * weight),
                }
            )
    return rows


def _tells_apart(rewards: torch.Tensor) -> bool:
    """A hard question (one right answer) and an even one: the standard deviations differ."""
    hard, even = rewards.sum(1).tolist()
    return hard == 1 and even == tabular.GROUP / 2


def _audit_table(rows: Sequence[Row]) -> Table:
    header = ("aggregation", "formula", "own length", "other lengths", "micro-batches", "verdict")
    cells: list[tuple[str, ...]] = [header]
    for row in _audit(rows):
        verdict = "biased: " + ", ".join(row["biases"]) if row["biases"] else "unbiased"
        numbers = (row["own_length"], row["other_length"], row["splitting"])
        cells.append((row["name"], row["formula"], *(f"{number:.2f}" for number in numbers), verdict))
    title = (
        "Audit: exponent k in |gradient of a token| ∝ length^k; gradient with two micro-batches / with one"
    )
    return Table(title, cells)


def _toy_table(rows: Sequence[Row]) -> Table:
    curves = [row for row in rows if row["kind"] == "curve"]
    cells: list[tuple[str, ...]] = [("objective", "reward", "length, wrong", "length, right")]
    for name in ALGORITHMS:
        ends = []
        for key in ("reward", "length_incorrect", "length_correct"):
            values = per_seed(curves, partial(final, algorithm=name, key=key))
            ends.append(f"{sum(values) / len(values):.2f} ({min(values):.2f} - {max(values):.2f})")
        cells.append((NAMES[name], *ends))
    title = f"Tabular policy after training (mean and range over seeds; budget {tabular.BUDGET} tokens)"
    return Table(title, cells)


def _draw_weights(axis: Any, rows: Sequence[Row]) -> None:
    """One bar per response: as long as the response, coloured by what multiplies ∇log π of its tokens.

    Relative to the largest: the scale between objectives is a matter of the learning rate.
    """
    import matplotlib

    largest = max(abs(row["token"]) for row in rows)
    colours = matplotlib.colormaps["RdBu"]
    for row in rows:
        place = row["question"] * (tabular.GROUP + 1.5) + row["response"]
        shade = colours(0.5 + 0.5 * row["token"] / largest)
        axis.barh(place, row["length"], height=0.85, color=shade, edgecolor="0.5", linewidth=0.5)
        text = f"{'right' if row['right'] else 'wrong'} {row['token'] / largest:+.2f}"
        axis.text(row["length"] + 0.4, place, text, va="center", fontsize=6)
    axis.set(xlabel="tokens (number: weight / largest)", yticks=(3.5, 13), xlim=(0, tabular.BUDGET + 8))
    axis.set_yticklabels(("hard\nquestion", "even\nquestion"), fontsize="small")
    axis.invert_yaxis()
