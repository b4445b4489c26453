"""An engine is compared with the learner at one and the same version, and ends its actor when it differs (I6)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import pytest

from actors.engine import EngineLostError
from actors.weights.probe import MismatchProbe
from common.errors import RunFailedError
from common.weights.probe import Probe

PROBE = Probe((5, 6, 7), (-1.0, -2.0))


class FakeEngine:
    """Gives the learner's log-probabilities plus `off`; what `meanwhile` does happens before it answers."""

    def __init__(self, off: float = 0.0, meanwhile: Callable[[], None] = lambda: None) -> None:
        self.off, self.meanwhile, self.version = off, meanwhile, 1

    async def score(self, tokens: list[int]) -> np.ndarray:
        assert tokens == [5, 6, 7]
        await asyncio.sleep(0)
        self.meanwhile()
        return np.array(PROBE.logprobs, dtype=np.float32) + np.float32(self.off)


def compare(engine: FakeEngine, limit: float = 0.1) -> dict[str, float]:
    async def run() -> dict[str, float]:
        check = MismatchProbe(engine.score, lambda: engine.version, limit)
        check.start(PROBE, 1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(check.watch(), 0.05)
        return check.meters()

    return asyncio.run(run())


def test_what_differs_within_the_limit_is_metered() -> None:
    found = compare(FakeEngine(off=0.05))
    assert found == {"probe_mean": pytest.approx(0.05), "probe_max": pytest.approx(0.05), "probes": 1}


@pytest.mark.parametrize("off", [0.2, float("nan")])
def test_what_differs_more_ends_the_actor(off: float) -> None:
    async def run() -> None:
        check = MismatchProbe(FakeEngine(off).score, lambda: 1, 0.1)
        check.start(PROBE, 1)
        await check.watch()

    with pytest.raises(RunFailedError, match=r"probe of version 1, more than learner.max_mismatch = 0.1"):
        asyncio.run(run())


def test_another_version_says_nothing() -> None:
    engine = FakeEngine(off=9.0)
    engine.meanwhile = lambda: setattr(engine, "version", 2)
    assert compare(engine) == {}


def test_a_lost_engine_is_somebody_elses_news() -> None:
    def die() -> None:
        raise EngineLostError("gone")

    assert compare(FakeEngine(meanwhile=die)) == {}


def test_a_newer_probe_takes_the_place_of_one_that_still_waits() -> None:
    async def run() -> dict[str, float]:
        started = asyncio.Event()

        async def score(tokens: list[int]) -> np.ndarray:
            if not started.is_set():
                started.set()
                await asyncio.Event().wait()
            return np.array(PROBE.logprobs, dtype=np.float32)

        check = MismatchProbe(score, lambda: 2, 0.1)
        check.start(PROBE, 1)
        await started.wait()
        check.start(PROBE, 2)
        await asyncio.sleep(0.01)
        return check.meters()

    assert asyncio.run(run())["probes"] == 1
