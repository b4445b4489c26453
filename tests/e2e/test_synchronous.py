"""`max_staleness = 0` is synchronous training bit for bit: the whole system against one plain loop.

Real broker, real learner process (DeepSpeed), real weight push; two actors in threads that race for questions and
sample from the weights they were pushed. Every version they hold, and the last one, has the checksums of the
loop's, parameter by parameter.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors import safe_open

from common.messages import Goodbye, Heartbeat, Hello, Lease, Publish, Pulse
from common.weights.checksum import checksum
from common.weights.scripted import ScriptedReceiver
from common.wire import BrokerUnreachable, Client
from tests.e2e.learner_world import REPOSITORY, final_status, learner_recipe, start_learner, train_points
from tests.e2e.sampling_policy import Sampler
from tests.scripted.broker import running_broker
from tests.scripted.wait import until

pytestmark = pytest.mark.e2e
PATIENCE_S = 240.0
PER_VERSION = 4


class LoadingReceiver(ScriptedReceiver):
    """A receiver that hands its weights to a sampler."""

    sampler: Sampler
    held: dict[int, dict[str, str]]

    def _commit(self, stagers, version: int) -> None:
        staged = stagers[0].take(version)
        self.sampler.load(staged.tensors())
        self.held[version] = {name: checksum(tensor) for name, tensor in staged.tensors()}
        staged.release()
        self.version = version


class SamplingActor:
    """Leases, samples from the weights that it holds, publishes; dawdles at random so that actors overtake.

    It leaves one question of each version to the other actor, however late that one comes.
    """

    def __init__(self, address: str, name: str, recipe) -> None:
        hello = Hello(role="actor", peer=name, software="0.1.0", host="test", pid=os.getpid())
        self.name, self._client, self._sampler = name, Client(address, hello), Sampler(recipe)
        self._random = random.Random(name)
        self._receiver: LoadingReceiver | None = None
        self.held: dict[int, dict[str, str]] = {}
        self.published: Counter[int] = Counter()  # groups by version
        self.failed: BaseException | None = None

    def run(self) -> None:
        """Until the broker says that the run is over."""
        try:
            self._take_part()
        except BaseException as error:
            self.failed = error
            raise

    def _take_part(self) -> None:
        run = self._client.connect(timeout_s=60.0).run
        while (pulse := self._beat()).command == "run":
            if self._receiver is None and pulse.weights is not None:
                self._follow(pulse.weights.address, run)
            if self._receiver is None or self._receiver.version is None:
                time.sleep(0.02)
                continue
            self._work(pulse.era, self._receiver.version)
        if self._receiver is not None:
            self._receiver.stop.set()
        with suppress(BrokerUnreachable):  # it ends when all have left, perhaps before its answer is out
            self._client.request(Goodbye(reason="the run is over"), timeout_s=5.0)

    def _beat(self) -> Pulse:
        version = self._receiver.version if self._receiver else None
        return self._client.request(Heartbeat(state="working", version=version or 0)).message

    def _follow(self, address: str, run: str) -> None:
        self._receiver = LoadingReceiver(address, run, self.name)
        self._receiver.sampler, self._receiver.held = self._sampler, self.held
        threading.Thread(target=self._receiver.run, daemon=True).start()

    def _work(self, era: int, version: int) -> None:
        if self.published[version] == PER_VERSION - 1:
            time.sleep(0.02)
            return
        grant = self._client.request(Lease(capacity=1, version=version, era=era, wait_s=0.05)).message
        for assignment in grant.groups:
            assert self._receiver.version == version, "staleness 0: nothing newer while a lease is open"
            header, payload = self._sampler.group(
                assignment.group, lease=assignment.lease, actor=self.name, era=era, version=version
            )
            time.sleep(self._random.random() * 0.05)
            self._client.request(Publish(header=header), payload)
            self.published[version] += 1


def plain_loop(recipe, folder: Path) -> dict:
    """What the loop makes of the same recipe."""
    (folder / "recipe.json").write_text(recipe.model_dump_json())
    line = [sys.executable, "-m", "tests.e2e.synchronous_loop"]
    done = subprocess.run(
        [*line, str(folder / "recipe.json"), str(folder / "loop.json")],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "loop.json").read_text())


def exported(folder: Path) -> dict[str, str]:
    """Checksums of an exported model."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: checksum(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - not a dict


def test_no_staleness_is_synchronous_training(tmp_path: Path) -> None:
    recipe = learner_recipe(
        tmp_path,
        run={"steps": 4},
        batch={"max_staleness": 0, "optimizer_steps": 2, "questions_per_step": PER_VERSION},
        broker={"dead_after_s": 200.0},  # an actor that a busy machine holds up is not dead
        rollout={"max_tokens": 12},
        learner={"max_mismatch": 1e-4},
    )
    with running_broker(recipe) as address:
        actors = [SamplingActor(address, name, recipe) for name in ("a", "b")]
        threads = [threading.Thread(target=actor.run, daemon=True) for actor in actors]
        learner = start_learner(address, tmp_path / "learner.log")
        for thread in threads:
            thread.start()

        def over() -> bool:
            assert not [actor.failed for actor in actors if actor.failed]
            return learner.poll() is not None

        try:
            until(over, (tmp_path / "learner.log").read_text, PATIENCE_S, every=0.1)
            assert learner.returncode == 0, (tmp_path / "learner.log").read_text()
        finally:
            if learner.poll() is None:
                learner.kill()
            learner.wait()
        for thread in threads:
            thread.join(60.0)
    loop = plain_loop(recipe, tmp_path)
    held = actors[0].held | actors[1].held
    assert set(held) >= set(range(4))
    for actor in actors:
        assert actor.failed is None
        assert set(actor.published) == set(range(4)), "both took part"
        for version, checksums in actor.held.items():
            assert checksums == loop["versions"][version]
    assert exported(Path(final_status(recipe)["pinned"]["path"]) / "hf") == loop["versions"][4]
    assert len({str(version) for version in loop["versions"]}) == 5, "every step moved the weights"
    assert all(point["staleness_max"] == 0 for point in train_points(recipe).values())
