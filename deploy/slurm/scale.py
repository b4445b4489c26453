"""More or fewer actors of a run on Slurm, while it goes on.

Invariant: no two tasks of a run hold the same index at one time (an index is an actor's name), and an actor
that goes is asked first: it publishes what it has finished and hands back the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from common.errors import UserError
from common.run_files import SLURM_FOLDER
from deploy.slurm import queue
from deploy.slurm.plan import tasks_of
from deploy.slurm.queue import Task
from deploy.slurm.state import locked, read_state, write_state


class Change(NamedTuple):
    """What scaling does: `add` indices to submit, `cancel` tasks that only wait, `ask` running ones to leave."""

    add: list[int]
    cancel: list[Task]
    ask: list[Task]


def plan_change(tasks: list[Task], leaving: set[str], wanted: int) -> Change:
    """How to get from the queue to `wanted` actors.

    Args:
        tasks: the run's array tasks that run or wait.
        leaving: labels of tasks that were asked to leave before; they count no more, but hold their index.
        wanted: number of actors.

    The lowest free indices come first; of those that go, waiting tasks go before running ones, high indices
    before low ones.
    """
    staying = [task for task in tasks if task.label not in leaving]
    missing = wanted - len(staying)
    if missing >= 0:
        taken = {task.index for task in tasks}
        free = (index for index in range(len(taken) + missing) if index not in taken)
        return Change([index for index, _ in zip(free, range(missing), strict=False)], [], [])
    ordered = sorted(staying, key=lambda task: (task.state != "PENDING", -(task.index or 0)))
    going = ordered[:-missing]
    return Change([], [t for t in going if t.state == "PENDING"], [t for t in going if t.state != "PENDING"])


def scale_array(folder: Path, actors: int) -> str:
    """Grow or shrink the run's job array to hold `actors`; returns a sentence that says what was done.

    Raises:
        UserError: the run is not on the cluster, its actors share jobs that so many do not fill, or Slurm refuses.
    """
    state = read_state(folder)
    per_job = state.options.get("actors_per_job", 1)
    wanted = tasks_of(actors, per_job)
    queue.require_slurm()
    with locked(folder):
        state = read_state(folder)
        if not any(task.job == state.head for task in queue.queued(f"slipstream-{state.run}")):
            raise UserError(
                f"run '{state.run}' is not on the cluster (job {state.head} has ended): send it again with "
                "slipstream submit ... --resume."
            )
        tasks = [t for t in queue.queued(f"slipstream-{state.run}-actors") if t.index is not None]
        state.leaving = [label for label in state.leaving if label in {task.label for task in tasks}]
        change = plan_change(tasks, set(state.leaving), wanted)
        if change.add:
            file = str(folder / SLURM_FOLDER / "actors.sbatch")
            after = f"--dependency=after:{state.head}"
            state.arrays.append(queue.submit_file(file, after, f"--array={queue.array_ranges(change.add)}"))
        state.leaving += [task.label for task in change.ask]
        write_state(folder, state)
        queue.cancel(task.label for task in change.cancel)
        queue.ask_to_leave(task.label for task in change.ask)
    return _sentence(tasks, change, wanted, per_job)


def _sentence(tasks: list[Task], change: Change, wanted: int, per_job: int) -> str:
    running = sum(task.state == "RUNNING" for task in tasks)
    parts = [f"{len(change.add)} submitted"] if change.add else []
    parts += [f"{len(change.cancel)} taken out of the queue"] if change.cancel else []
    parts += [f"{len(change.ask)} asked to leave"] if change.ask else []
    done = ", ".join(parts) or "nothing to do"
    unit = "actors" if per_job == 1 else f"jobs of {per_job} actors"
    return f"{unit}: {running} running and {len(tasks) - running} waiting before; {wanted} wanted: {done}"
