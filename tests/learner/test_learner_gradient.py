"""I5 with real DeepSpeed: the update depends on the responses alone.

One step of gradient descent must give the same weights whatever the micro-batches, ranks and ZeRO stage, and
the same as a calculation that shares no code with the learner: a padded batch through the plain Hugging Face
model, and the formula of the paper (section 3.1) written out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.learner.tiny import made_up_batch, tiny_lm, tiny_recipe

REPOSITORY = Path(__file__).resolve().parents[2]
LR = 20.0
L = 32.0
MIXED = [[1, 0, 0, 1], [0, 0, 0, 1], [1, 1, 0, 1], [0.5, 0, 0, 0]]
WITH_EQUAL = [*MIXED, [1, 1, 1, 1], [0, 0, 0, 0]]  # the last two groups have no variance
STAGES = (0, 1, 2, 3)


def recipe(stage: int, budget: int, groups: int = len(MIXED), **sections: Any) -> dict[str, Any]:
    tree = {
        "batch": {"questions_per_step": groups, "optimizer_steps": 1},
        "learner": {"lr": LR, "zero_stage": stage, "micro_batch_tokens": budget, "max_grad_norm": 1e9},
    }
    for name, values in sections.items():
        tree.setdefault(name, {}).update(values)
    return tiny_recipe(**tree).model_dump(mode="json")


def cases() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for stage in STAGES:
        found[f"stage {stage}, one row"] = {"recipe": recipe(stage, 4096), "batch": {"rewards": MIXED}}
        found[f"stage {stage}, many rows"] = {"recipe": recipe(stage, 40), "batch": {"rewards": MIXED}}
    count = len(WITH_EQUAL)
    found["equal sent"] = {"recipe": recipe(2, 64, count), "batch": {"rewards": WITH_EQUAL}}
    found["equal filtered"] = {**found["equal sent"], "sent": len(MIXED)}
    found["all filtered"] = {**found["equal sent"], "sent": 0}
    masked = recipe(2, 64, batch={"truncated": "mask"})
    found["masked"] = {"recipe": masked, "batch": {"rewards": MIXED, "truncated": (0, 5, 15)}}
    return found


# Objectives that look at the whole batch first, or at another model: what they see must not depend on the split.
SPLIT = {
    "PPO": {"algorithm": {"preset": "ppo"}, "batch": {"zero_variance": "train", "optimizer_steps": 2}},
    "KL in the reward": {"algorithm": {"kl_in_reward": 0.1}, "batch": {"zero_variance": "train"}},
    "KL in the loss": {"algorithm": {"kl_beta": 0.1}, "batch": {"zero_variance": "train"}},
    "proximal, two epochs": {
        "algorithm": {"anchor": "proximal", "correction": "tis", "epochs": 2},
        "batch": {"optimizer_steps": 2},
    },
    "M2PO": {"algorithm": {"anchor": "proximal", "correction": "m2po"}, "batch": {"optimizer_steps": 2}},
    "GSPO": {"algorithm": {"loss": "gspo", "aggregation": "response_mean"}},
    "adapters": {"lora": {"rank": 4}},
    "recomputed activations": {"learner": {"gradient_checkpointing": True}},
}


def splits() -> dict[str, Any]:
    """Each objective with one row per update, and with many; rates small enough to stay off any cliff."""
    found = {}
    for name, sections in SPLIT.items():
        learner = {"lr": 2.0, **sections.get("learner", {})}
        for rows, budget in (("one row", 4096), ("many rows", 40)):
            tree = recipe(2, budget, **{**sections, "learner": learner})
            found[f"{name}, {rows}"] = {"recipe": tree, "batch": {"rewards": MIXED}}
    return found


def resumes() -> dict[str, Any]:
    """Runs of six steps, straight and interrupted, with AdamW, a schedule and two updates per step."""
    sections: dict[str, Any] = {
        "run": {"steps": 6},
        "batch": {"optimizer_steps": 2},
        "learner": {"schedule": "cosine", "warmup_steps": 3, "lr": 1e-2, "max_grad_norm": 0.1},
    }
    found = {
        f"resume {stage}": {"recipe": recipe(stage, 64, **sections), "rewards": MIXED} for stage in STAGES
    }
    found["resume bfloat16"] = {
        "recipe": recipe(2, 64, **sections, model={"dtype": "bfloat16"}),
        "rewards": MIXED,
    }
    return found


def launch(folder: Path, ranks: int, cases: dict[str, Any]) -> dict[str, Any]:
    """Run the worker on `ranks` processes; returns its outcomes."""
    (folder / "cases.json").write_text(json.dumps(cases))
    script = [
        str(REPOSITORY / "tests/learner/update_worker.py"),
        str(folder / "cases.json"),
        str(folder / "out.pt"),
    ]
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*start, *script], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "out.pt")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Outcomes of all cases by number of ranks; one alone leaves a core to the others."""
    every = {**cases(), **splits(), **resumes()}
    folders = {ranks: tmp_path_factory.mktemp("ranks") for ranks in (1, 2)}
    with ThreadPoolExecutor() as pool:
        running = {ranks: pool.submit(launch, folder, ranks, every) for ranks, folder in folders.items()}
    return {ranks: outcome.result() for ranks, outcome in running.items()}


@pytest.fixture(params=[1, 2], ids=["1 rank", "2 ranks"])
def outcomes(request: pytest.FixtureRequest, both: dict[int, dict[str, Any]]) -> dict[str, Any]:
    return both[request.param]


def expected(
    rewards: list[list[float]], truncated: tuple[int, ...] = (), scheduled: int | None = None
) -> Any:
    """Weights after one step of −(1/(N L)) Σ_i Σ_t min(ρ A_i, clip(ρ, 0.8, 1.2) A_i), A_i = R_i − mean R."""
    batch, payloads = made_up_batch(rewards)
    lm = tiny_lm()
    samples = []
    for header, row in zip(batch.groups, rewards, strict=True):
        prompt, ids = (np.frombuffer(part, "<i4").tolist() for part in payloads[header.group][:2])
        logprobs = np.frombuffer(payloads[header.group][2], "<f4")
        start = 0
        for response, reward in zip(header.responses, row, strict=True):
            span = slice(start, start := start + response.tokens)
            samples.append((prompt, ids[span], logprobs[span], reward - sum(row) / len(row)))
    width = max(len(prompt) + len(ids) for prompt, ids, _, _ in samples)
    tokens = torch.tensor([(p + r + [0] * width)[:width] for p, r, _, _ in samples])
    mask = torch.tensor([([1] * (len(p) + len(r)) + [0] * width)[:width] for p, r, _, _ in samples])
    log_softmax = lm(input_ids=tokens, attention_mask=mask).logits.log_softmax(-1)
    loss = torch.zeros(())
    for number, (prompt, ids, behaviour, advantage) in enumerate(samples):
        if number in truncated:
            continue
        rows = torch.arange(len(prompt) - 1, len(prompt) + len(ids) - 1)
        logp = log_softmax[number, rows, torch.tensor(ids)]
        ratio = (logp - torch.from_numpy(behaviour.copy())).exp()
        loss = loss - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum()
    (loss / ((scheduled or len(samples)) * L)).backward()
    return {name: (p - LR * p.grad).detach() for name, p in lm.named_parameters()}, initial()


def initial() -> dict[str, torch.Tensor]:
    """The weights before the step."""
    return {name: parameter.detach() for name, parameter in tiny_lm().named_parameters()}


def difference(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    """‖got − want‖ / ‖want‖ over all parameters, in double precision."""
    assert got.keys() == want.keys()
    square = sum(float((got[n].double() - want[n].double()).square().sum()) for n in want)
    return (square / sum(float(w.double().square().sum()) for w in want.values())) ** 0.5


def assert_same_step(got: dict[str, torch.Tensor], want: Any) -> None:
    after, before = want
    assert difference(got, after) <= 1e-6
    # The update itself, too: weights alone would also pass with a small update that is wrong.
    step = {name: got[name] - before[name] for name in after}
    wanted = {name: after[name] - before[name] for name in after}
    assert difference(step, wanted) <= 2e-5


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("rows", ["one row", "many rows"])
def test_update_equals_an_independent_calculation(outcomes: dict[str, Any], stage: int, rows: str) -> None:
    outcome = outcomes[f"stage {stage}, {rows}"]
    assert outcome["rows"][0] == 1 if rows == "one row" else outcome["rows"][0] >= 5
    assert_same_step(outcome["weights"], expected(MIXED))


def test_groups_without_variance_have_no_say_sent_or_filtered(outcomes: dict[str, Any]) -> None:
    """Trap: dropping them from N would raise the learning rate by their share."""
    count = 4 * len(WITH_EQUAL)
    for name in ("equal sent", "equal filtered"):
        assert_same_step(outcomes[name]["weights"], expected(MIXED, scheduled=count))


def test_a_step_without_any_group_changes_nothing(outcomes: dict[str, Any]) -> None:
    outcome = outcomes["all filtered"]
    assert outcome["grad_norms"] == [0.0]
    assert difference(outcome["weights"], initial()) == 0.0


def test_masked_truncated_responses_leave_the_loss_and_keep_their_place(outcomes: dict[str, Any]) -> None:
    assert_same_step(outcomes["masked"]["weights"], expected(MIXED, truncated=(0, 5, 15)))


@pytest.mark.parametrize("case", resumes())
def test_resume_is_exact(outcomes: dict[str, Any], case: str) -> None:
    """3 steps, a new engine, 3 more: bit for bit the weights of 6 steps, and the rest of the schedule."""
    outcome = outcomes[case]
    assert outcome["step"] == 3
    assert outcome["resumed"] == outcome["straight"]
    assert len(set(outcome["resumed"]["rates"][6:])) == 6


@pytest.mark.parametrize("name", SPLIT)
def test_no_objective_depends_on_the_split(both: dict[int, dict[str, Any]], name: str) -> None:
    """1 or 2 ranks, one row or many: one update."""
    first = both[1][f"{name}, one row"]
    assert min(both[1][f"{name}, many rows"]["rows"]) >= 2
    moved = difference(first["weights"], initial())
    assert moved > 1e-4
    for ranks, rows in ((1, "many rows"), (2, "one row"), (2, "many rows")):
        other = both[ranks][f"{name}, {rows}"]
        assert difference(other["weights"], first["weights"]) <= max(1e-6, 1e-4 * moved)
        assert other["metrics"]["tokens"] == first["metrics"]["tokens"]
        assert other["mismatch"]["mismatch_mean"] > 0


def test_recomputed_activations_change_nothing(both: dict[int, dict[str, Any]]) -> None:
    weights = both[1]["recomputed activations, one row"]["weights"]
    plain = expected(MIXED)[0]
    before = initial()
    step = {name: (weights[name] - before[name]) * LR / 2.0 for name in weights}
    wanted = {name: plain[name] - before[name] for name in plain}
    assert difference(step, wanted) <= 1e-4
