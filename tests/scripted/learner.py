"""A learner without DeepSpeed: takes, "trains" for a while, commits, writes checkpoints, pins.

    python -m tests.scripted.learner ADDRESS --checkpoint FILE [--step-s 0.02] [--every 2]

Its whole state is the list of groups that it has trained on, one list per step; a checkpoint is that list,
written atomically. After `kill -9` it starts from the last checkpoint and says so (`Rewind`).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

from common import stacks, wire
from common.messages import (
    Batch,
    Commit,
    Fetch,
    Goodbye,
    Heartbeat,
    Hello,
    Pin,
    Pulse,
    Rewind,
    Rewound,
    Serve,
    Take,
    WeightsAddress,
)
from common.stacks import StackAnswers
from common.wire import BrokerUnreachable, Client, RefusedError

SOFTWARE = "0.1.0"


class ScriptedLearner:
    """Runs until it is told to stop.

    Args:
        address: of the broker.
        checkpoint: file of the checkpoint; read at the start if it exists.
        step_s: seconds that a step takes.
        every: steps between checkpoints.
        prefetch: take the next step before the one in hand is committed.
    """

    def __init__(
        self,
        address: str,
        checkpoint: Path,
        *,
        name: str = "learner",
        step_s: float = 0.01,
        every: int = 2,
        prefetch: bool = False,
        keys: Path | None = None,
    ) -> None:
        hello = Hello(
            role="learner", peer=name, software=SOFTWARE, host=socket.gethostname(), pid=os.getpid()
        )
        self.checkpoint, self.step_s, self.every, self.prefetch = checkpoint, step_s, every, prefetch
        self.history: list[list[str]] = []
        self.batches: list[Batch] = []
        self.reasons: list[str] = []
        self._client = Client(address, hello, keys=keys)
        self._pulse_client = Client(address, hello, keys=keys)
        self._stopping = threading.Event()
        self._stacks = StackAnswers()
        self._beat_s = 0.1

    def run(self) -> None:
        """Join, rewind to the checkpoint, train until stopped, save, say goodbye."""
        welcome = self._client.connect(timeout_s=None)
        self._beat_s = min(self._beat_s, welcome.heartbeat_s / 2)
        self._restore()
        beat = threading.Thread(target=self._heartbeats, daemon=True)
        beat.start()
        try:
            self._rewind()
            while not self._stopping.is_set():
                self._step()
            self._save()
            with suppress(BrokerUnreachable):  # which may end before it has answered
                self._client.request(Goodbye(reason="told to stop"), timeout_s=2.0)
        finally:
            self._stopping.set()
            beat.join(5.0)
            self._client.close()

    def stop(self) -> None:
        """Leave after the step in hand."""
        self._stopping.set()

    def _restore(self) -> None:
        if self.checkpoint.exists():
            self.history = json.loads(self.checkpoint.read_text())

    def _rewind(self) -> None:
        step = len(self.history)
        reply = self._ask(Rewind(step=step, version=step))
        assert isinstance(reply, Rewound)
        self._ask(Serve(weights=WeightsAddress(address="127.0.0.1:1", token="scripted", era=reply.era)))

    def _heartbeats(self) -> None:
        while not self._stopping.is_set():
            pulse = self._pulse_client.request(Heartbeat(state="training"), timeout_s=None).message
            assert isinstance(pulse, Pulse)
            if pulse.command != "run":
                self._stopping.set()
            if request := self._stacks.wanted(pulse):
                self._pulse_client.request(self._stacks.answer(request), timeout_s=5.0)
            self._stopping.wait(self._beat_s)
        self._pulse_client.close()

    def _take(self, step: int) -> Batch | None:
        batch = self._ask(Take(step=step, wait_s=0.2), hold_s=0.2)
        if not isinstance(batch, Batch):
            return None
        if not batch.ready:
            self.reasons.append(batch.reason or "")
            return None
        return batch

    def _step(self) -> None:
        step = len(self.history)
        batch = self._take(step)
        if batch is None:
            return
        keys = [header.group for header in batch.groups]
        if keys:
            payloads = self._client.request(Fetch(groups=keys), timeout_s=None)
            sizes = [size for header in batch.groups for size in header.payload_sizes]
            assert [len(part) for part in payloads.payload] == sizes
        if self.prefetch:
            self._ask(Take(step=step + 1, wait_s=0.0))
        time.sleep(self.step_s)
        rewards = [r.reward for header in batch.groups for r in header.responses]
        metrics = {"reward": sum(rewards) / max(1, len(rewards))}
        if self._ask(Commit(step=step, version=step + 1, metrics=metrics)) is None:
            return
        self.batches.append(batch)
        self.history.append([str(key) for key in keys])
        if len(self.history) % self.every == 0:
            self._save()

    def _save(self) -> None:
        temporary = self.checkpoint.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.history))
        os.replace(temporary, self.checkpoint)
        self._ask(Pin(step=len(self.history), path=str(self.checkpoint)))

    def _ask(self, message: object, hold_s: float = 0.0) -> object | None:
        """A reply; None where the broker wants the learner to start over or to try later."""
        while True:
            try:
                return self._client.request(message, timeout_s=None, hold_s=hold_s).message
            except RefusedError as error:
                if error.code != "full":
                    self.reasons.append(f"{message.kind}: {error}")
                    return None
                time.sleep(0.05)


def main() -> None:
    """Command line of a scripted learner."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--step-s", type=float, default=0.01)
    parser.add_argument("--every", type=int, default=2)
    options = parser.parse_args()
    stacks.arm()
    wire.ATTEMPT_S = 0.5  # a request that a killed broker swallowed is sent again soon
    ScriptedLearner(options.address, options.checkpoint, step_s=options.step_s, every=options.every).run()


if __name__ == "__main__":
    main()
