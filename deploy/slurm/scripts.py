"""The batch files of a plan, from the templates beside this module.

Invariant: paths and words are quoted for the shell.
"""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path

from deploy.slurm.plan import Plan
from deploy.templates import templates_in

TEMPLATES = ("head.sbatch", "actors.sbatch")


def render(plan: Plan, *, set_addresses: bool) -> dict[str, str]:
    """File name -> text of the two batch files.

    Args:
        plan: what to ask for.
        set_addresses: the job's script finds the node's address and sets `broker.bind` and `weights.bind`;
            false where the recipe names an address itself.
    """
    environment = templates_in(Path(__file__).parent)
    options = plan.options
    values = {
        **{name: getattr(plan, name) for name in ("name", "program", "head_job", "actors_job", "restarts")},
        **{name: getattr(plan, name) for name in ("ranks_per_node", "gpus_per_node", "gpus_per_actor")},
        **{name: getattr(plan, name) for name in ("cpus_per_rank", "cpus_per_actor")},
        **{name: getattr(plan, name) for name in ("head_notice", "actor_notice")},
        **{name: getattr(plan, name) for name in ("broker_port", "master_port", "actor_tasks")},
        **asdict(options),
        "actor_partition": options.actor_partition or options.partition,
        "actor_qos": options.actor_qos or options.qos,
        "actor_time": options.actor_time or options.time,
        "head_extra": (*options.extra, *options.head_extra),
        "actor_extra": (*options.extra, *options.actor_extra),
        "folder": shlex.quote(str(plan.folder)),
        "directory": shlex.quote(str(plan.directory)),
        "set_addresses": set_addresses,
    }
    return {name: environment.get_template(f"{name}.jinja").render(values) for name in TEMPLATES}
