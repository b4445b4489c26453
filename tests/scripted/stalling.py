"""A scripted actor that stops making progress after a few groups, while its process lives on.

    python -m tests.scripted.stalling deadlock ADDRESS --name actor-0

`deadlock` takes a lock twice in the thread that works; signs of life go on from the other thread.
`helper` does the same, in a child process that the actor waits for, as an actor waits for its engine.
"""

from __future__ import annotations

import argparse
import os
import threading
import time

from common import stacks, wire
from common.messages import Assignment
from tests.scripted.actor import ScriptedActor

GROUPS = 8


def wait_for_ever_on_a_lock() -> None:
    """What the test looks for in the stacks."""
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


class DeadlockedActor(ScriptedActor):
    """Answers `GROUPS` times, then no more."""

    def _publish(self, assignment: Assignment, era: int, first: int) -> None:
        if self.published == GROUPS:
            self._hang()
        super()._publish(assignment, era, first)

    def _hang(self) -> None:
        wait_for_ever_on_a_lock()


class ActorWithHungHelper(DeadlockedActor):
    """Waits for a child that hangs."""

    def _hang(self) -> None:
        helper = os.fork()
        if not helper:
            wait_for_ever_on_a_lock()
        while not self._stopping.is_set():
            time.sleep(0.05)
        os.kill(helper, 9)
        os.waitpid(helper, 0)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("how", choices=["deadlock", "helper"])
    parser.add_argument("address")
    parser.add_argument("--name", required=True)
    options = parser.parse_args()
    stacks.arm()
    wire.ATTEMPT_S = 0.5
    kind = {"deadlock": DeadlockedActor, "helper": ActorWithHungHelper}[options.how]
    kind(options.address, options.name).run()


if __name__ == "__main__":
    main()
