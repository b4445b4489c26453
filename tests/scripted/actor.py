"""An actor without an engine: leases, makes up responses, publishes. Same messages, same order, no vLLM.

    python -m tests.scripted.actor ADDRESS --name actor-0 [--group-s 0.01] [--tokens 20]

It holds its leases in memory only, so that `kill -9` loses them as a real actor would.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from common import stacks, wire
from common.messages import (
    Assignment,
    EvalJob,
    EvalResult,
    EvalRow,
    Goodbye,
    GroupHeader,
    GroupId,
    Heartbeat,
    Hello,
    Lease,
    Publish,
    Pulse,
    Release,
    ResponseHeader,
    Scored,
)
from common.stacks import StackAnswers
from common.wire import BrokerUnreachable, Client, RefusedError

SOFTWARE = "0.1.0"
VOCABULARY = 64


def make_group(
    assignment: Assignment, *, actor: str, era: int, versions: tuple[int, ...], tokens: int, seed: int = 0
) -> tuple[GroupHeader, list[bytes]]:
    """A made-up scored group: `tokens` on average per response, sampled by `versions` in turn."""
    rng = np.random.default_rng([seed, *assignment.group, assignment.lease])
    lengths = rng.integers(
        max(len(versions), tokens // 2), 2 * tokens, size=assignment.samples, endpoint=True
    )
    rewards = rng.integers(0, 2, size=assignment.samples).astype(float)
    if rewards.min() == rewards.max() and assignment.samples > 1:
        rewards[0] = 1.0 - rewards[0]
    responses = [_response(int(n), float(r), versions) for n, r in zip(lengths, rewards, strict=True)]
    prompt = np.arange(5, dtype=np.int32)
    total = int(lengths.sum())
    ids = rng.integers(0, VOCABULARY, size=total, dtype=np.int32)
    logprobs = -rng.random(total, dtype=np.float32)
    header = GroupHeader(
        group=assignment.group,
        lease=assignment.lease,
        era=era,
        actor=actor,
        prompt_tokens=len(prompt),
        responses=responses,
    )
    return header, [prompt.tobytes(), ids.tobytes(), logprobs.tobytes()]


def _response(tokens: int, reward: float, versions: tuple[int, ...]) -> ResponseHeader:
    share, rest = divmod(tokens, len(versions))
    runs = [(version, share + (rest if i == 0 else 0)) for i, version in enumerate(versions)]
    verdict = "correct" if reward else "wrong"
    return ResponseHeader(tokens=tokens, reward=reward, verdict=verdict, finish="stop", versions=runs)


def answer_evaluation(job: EvalJob, version: int, era: int) -> EvalResult:
    """Made-up answers to a whole evaluation: half of them right."""
    rows = []
    for number, question in enumerate(job.questions):
        verdict = "correct" if number % 2 else "wrong"
        scored = Scored(verdict=verdict, reward=float(number % 2), tokens=10 + number)
        rows.append(
            EvalRow(set=question.set, uid=question.uid, greedy=scored, sampled=[scored] * job.samples)
        )
    return EvalResult(job=job.job, version=version, era=era, rows=rows, seconds=0.1)


class ScriptedActor:
    """Runs until it is told to stop. Weights arrive with the pulse: there is nothing to load.

    Attributes:
        published: groups so far; refused: codes of refusals, in order.
        limit: groups after which it holds back what it has, until the limit is raised: a run that cannot end yet.
    """

    def __init__(
        self,
        address: str,
        name: str,
        *,
        capacity: int = 4,
        group_s: float = 0.01,
        tokens: int = 20,
        seed: int = 0,
        keys: Path | None = None,
    ) -> None:
        hello = Hello(role="actor", peer=name, software=SOFTWARE, host=socket.gethostname(), pid=os.getpid())
        self.name, self.capacity, self.group_s, self.tokens = name, capacity, group_s, tokens
        self.published, self.limit = 0, math.inf
        self.refused: list[str] = []
        self._random = random.Random(seed)
        self._client = Client(address, hello, keys=keys)
        self._pulse_client = Client(address, hello, keys=keys)
        self._policy = (0, 0)
        self._held: dict[GroupId, Assignment] = {}
        self._stopping = threading.Event()
        self._stacks = StackAnswers()
        self._beat_s = 0.1

    def run(self) -> None:
        """Join, work until stopped, say goodbye."""
        welcome = self._client.connect(timeout_s=None)
        self._policy = (welcome.era, welcome.version)
        self._beat_s = min(self._beat_s, welcome.heartbeat_s / 2)
        beat = threading.Thread(target=self._heartbeats, daemon=True)
        beat.start()
        try:
            while not self._stopping.is_set():
                self._work()
            with suppress(BrokerUnreachable):  # which may end before it has answered
                self._client.request(Goodbye(reason="told to stop"), timeout_s=2.0)
        finally:
            self._stopping.set()
            beat.join(5.0)
            self._client.close()

    def stop(self) -> None:
        """Finish what is in hand and leave."""
        self._stopping.set()

    def _heartbeats(self) -> None:
        while not self._stopping.is_set():
            era, version = self._policy
            beat = Heartbeat(state="working", version=version, era=era, leases=list(self._held))
            pulse = self._pulse_client.request(beat, timeout_s=None).message
            assert isinstance(pulse, Pulse)
            self._policy = (pulse.era, pulse.version)
            if pulse.command != "run":
                self._stopping.set()
            if request := self._stacks.wanted(pulse):
                self._pulse_client.request(self._stacks.answer(request), timeout_s=5.0)
            self._stopping.wait(self._beat_s)
        self._pulse_client.close()

    def _work(self) -> None:
        era, version = self._policy
        lease = Lease(capacity=self.capacity, version=version, era=era, wait_s=0.2)
        try:
            grant = self._client.request(lease, timeout_s=None, hold_s=0.2).message
        except RefusedError as error:
            self._note(error)
            return
        era, version = self._policy  # new weights may have come, and been told, while the request waited
        if grant.evaluation is not None:
            self._request(answer_evaluation(grant.evaluation, version, era))
        self._held = {assignment.group: assignment for assignment in grant.groups}
        for assignment in grant.groups:
            time.sleep(self.group_s * self._random.random() * 2)
            while self.published >= self.limit and not self._stopping.is_set():
                time.sleep(0.01)
            self._publish(assignment, era, version)
            self._held.pop(assignment.group, None)

    def _publish(self, assignment: Assignment, era: int, first: int) -> None:
        now_era, now = self._policy
        # Tokens of the version at the lease, and of the newest one if a swap came in between.
        versions = (first, now) if now_era == era and now > first else (first,)
        header, payload = make_group(
            assignment, actor=self.name, era=era, versions=versions, tokens=self.tokens, seed=7
        )
        self._request(Publish(header=header), payload)
        self.published += 1

    def _request(self, message: object, payload: list[bytes] | tuple[()] = ()) -> None:
        while not self._stopping.is_set():
            try:
                self._client.request(message, payload, timeout_s=None)
                return
            except RefusedError as error:
                if not self._note(error):
                    return

    def _note(self, error: RefusedError) -> bool:
        """Remember a refusal; True when the request is worth sending again."""
        self.refused.append(error.code)
        if error.code in ("full", "not_now"):
            time.sleep(0.05)
            return True
        return False

    def hand_back(self, reason: str) -> None:
        """Release what is held."""
        self._client.request(Release(groups=list(self._held), reason=reason))


def main() -> None:
    """Command line of a scripted actor."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--name", required=True)
    parser.add_argument("--capacity", type=int, default=4)
    parser.add_argument("--group-s", type=float, default=0.01)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    stacks.arm()
    wire.ATTEMPT_S = 0.5  # a request that a killed broker swallowed is sent again soon
    ScriptedActor(
        options.address,
        options.name,
        capacity=options.capacity,
        group_s=options.group_s,
        tokens=options.tokens,
        seed=options.seed,
    ).run()


if __name__ == "__main__":
    main()
