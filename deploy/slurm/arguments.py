"""The options of `slipstream submit`, as typer reads them.

Invariant: None (or an empty list) means "not given", so that a run which is sent again keeps what it had.
"""

from __future__ import annotations

from typing import Annotated

import typer

HEAD, ACTORS, SITE = "Broker and learner", "Actors", "Cluster"

LearnerNodes = Annotated[
    int | None, typer.Option(min=1, help="Nodes of the learner; default: 1.", rich_help_panel=HEAD)
]
GpusPerNode = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="GPUs, and so ranks, per learner node; default: learner.ranks / nodes; 0: CPU.",
        rich_help_panel=HEAD,
    ),
]
CpusPerGpu = Annotated[
    int | None, typer.Option(min=1, help="Cores of a job per GPU; default: 8.", rich_help_panel=SITE)
]
Partition = Annotated[
    str | None, typer.Option(help="Partition of all jobs; default: the cluster's.", rich_help_panel=SITE)
]
Time = Annotated[
    str | None,
    typer.Option(help="Time limit; near it a job saves its work and queues again.", rich_help_panel=SITE),
]
Lead = Annotated[
    int | None,
    typer.Option(
        min=60,
        metavar="SECONDS",
        help="How long before the time limit the learner ends its step and writes a checkpoint; default: 900, at "
        "most a quarter of the limit.",
        rich_help_panel=HEAD,
    ),
]
Account = Annotated[str | None, typer.Option(help="Slurm account.", rich_help_panel=SITE)]
Qos = Annotated[str | None, typer.Option(help="Slurm quality of service.", rich_help_panel=SITE)]
Interface = Annotated[
    str | None,
    typer.Option(help="Network interface of NCCL, gloo and the broker, e.g. ib0.", rich_help_panel=SITE),
]
Setup = Annotated[
    str | None,
    typer.Option(
        help="Shell commands that each job runs first, e.g. 'module load cuda'.", rich_help_panel=SITE
    ),
]
Sbatch = Annotated[
    list[str] | None,
    typer.Option(
        "--sbatch",
        metavar="OPTION",
        help="Another option of sbatch for all jobs, e.g. --mem-per-gpu=60G. Repeatable.",
        rich_help_panel=SITE,
    ),
]
HeadSbatch = Annotated[
    list[str] | None,
    typer.Option(
        "--head-sbatch", metavar="OPTION", help="One for broker and learner alone.", rich_help_panel=HEAD
    ),
]
Actors = Annotated[
    int | None,
    typer.Option(
        min=0, help="Actors, each a task of a job array; default: actor.count.", rich_help_panel=ACTORS
    ),
]
ActorsPerJob = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Actors that share a task, where the cluster gives whole nodes; default: 1.",
        rich_help_panel=ACTORS,
    ),
]
ActorPartition = Annotated[
    str | None, typer.Option(help="Another partition for the actors.", rich_help_panel=ACTORS)
]
ActorTime = Annotated[
    str | None, typer.Option(help="Another time limit for the actors.", rich_help_panel=ACTORS)
]
ActorQos = Annotated[
    str | None, typer.Option(help="Another quality of service for the actors.", rich_help_panel=ACTORS)
]
ActorSbatch = Annotated[
    list[str] | None,
    typer.Option(
        "--actor-sbatch", metavar="OPTION", help="One for the actors alone.", rich_help_panel=ACTORS
    ),
]
Resume = Annotated[
    bool, typer.Option(help="Continue the run in its folder, with the options that it was sent with.")
]
Fresh = Annotated[bool, typer.Option(help="Set an earlier run of this name aside.")]
DryRun = Annotated[bool, typer.Option(help="Only write the batch files; submit nothing.")]
