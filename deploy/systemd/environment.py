"""Environment files of a host's units: what the caller's shell knows, and each worker's part of the machine.

Invariant: no two workers of a host are given the same GPU, and a file that may hold a secret is for its owner alone.
"""

from __future__ import annotations

import getpass
import os
import pwd
import re
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError
from deploy.systemd.host import Host

if TYPE_CHECKING:
    from common.recipe import Recipe
    from deploy.launch.layout import Share

# Variables of the caller's shell that workers need; names of proxies are written in both cases.
HANDED_ON_PREFIXES = ("HF_", "MLFLOW_", "NCCL_", "GLOO_")
HANDED_ON = {
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
    *("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "CUDA_HOME", "LD_LIBRARY_PATH"),
}


def counted(recipe: Recipe, host: Host) -> Recipe:
    """The recipe with this host's actors."""
    return recipe.model_copy(update={"actor": recipe.actor.model_copy(update={"count": max(1, host.actors)})})


def environments(recipe: Recipe, host: Host) -> dict[str, str]:
    """Environment files: one for all workers, to be edited by people, and one per worker with its GPUs."""
    learner, actors = _shares(recipe, host)
    files = {"slipstream.env": _common_environment(host)}
    if "learner" in host.workers:
        files["slipstream-learner.env"] = _variables(learner)
    if "actor" in host.workers:
        files |= {f"slipstream-actor-{i}.env": _variables(share) for i, share in enumerate(actors)}
    return files


def _common_environment(host: Host) -> str:
    """What the caller's shell says about hub, MLflow, proxies and network; systemd itself hands none of it on."""
    named = {"HF_HOME": str(hub_cache(host)), "PYTHONUNBUFFERED": "1", "SLIPSTREAM_LOG": "INFO"}
    for name, value in os.environ.items():
        if (name.startswith(HANDED_ON_PREFIXES) or name.upper() in HANDED_ON) and "\n" not in value:
            named.setdefault(name, value)
    lines = [f"{name}={_assigned(value)}\n" for name, value in sorted(named.items())]
    return (
        "# Environment of every worker on this host, from the shell that wrote the units: edit it.\n"
        + "".join(lines)
    )


def _assigned(value: str) -> str:
    """A value in an environment file: quoted where it needs it (systemd.exec(5))."""
    if value and not any(c in value for c in " \t\"'\\;#$`"):
        return value
    return '"' + re.sub(r'(["\\$`])', r"\\\1", value) + '"'


def _shares(recipe: Recipe, host: Host) -> tuple[Share, tuple[Share, ...]]:
    """Parts of this host for its learner and its actors, as the one-machine launcher shares them out."""
    from deploy.launch.layout import share_out
    from deploy.launch.machine import this_machine

    cores, gpus = this_machine()
    if host.shared:
        layout = share_out(counted(recipe, host), cores, gpus)
        return layout.learner, layout.actors
    return _alone(recipe, host, cores, gpus)


def _alone(recipe: Recipe, host: Host, cores: list[int], gpus: list[str]) -> tuple[Share, tuple[Share, ...]]:
    """Shares on a host that has only the learner, only actors or neither: from the first GPU on."""
    from deploy.launch.layout import Share

    if recipe.launch.device == "cpu":
        gpus = []
    width = recipe.actor.tensor_parallel
    ranks = recipe.learner.ranks if "learner" in host.workers else 0
    actors = host.actors if "actor" in host.workers else 0
    if gpus and ranks + width * actors > len(gpus):
        raise UserError(
            f"{ranks + width * actors} GPUs are asked for, and this host has {len(gpus)}.",
            setting="--host-role",
        )
    threads = max(1, len(cores) // max(1, ranks + actors))
    shares = tuple(Share(None, threads, tuple(gpus[i * width : (i + 1) * width])) for i in range(actors))
    return Share(None, threads, tuple(gpus[:ranks])), shares


def _variables(share: Share) -> str:
    return "".join(f"{name}={value}\n" for name, value in share.environment().items())


def hub_cache(host: Host) -> Path:
    """The Hugging Face folder (models, question sets, token) of the account that the workers run as."""
    if "HF_HOME" in os.environ:
        return Path(os.environ["HF_HOME"])
    if host.user_manager or host.run_as == getpass.getuser():
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    else:
        try:
            cache = Path(pwd.getpwnam(host.run_as).pw_dir) / ".cache"
        except KeyError:
            raise UserError(f"there is no account '{host.run_as}' here.", setting="--run-as") from None
    return Path(cache) / "huggingface"
