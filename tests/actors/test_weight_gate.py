"""Commits wait for evaluations; evaluations that queue up cannot hold a commit back for ever."""

from __future__ import annotations

import asyncio

from actors.weights.gate import CommitGate


def test_a_commit_waits_for_all_holders_and_goes_before_new_ones():
    events: list[str] = []

    async def hold(gate: CommitGate, name: str, release: asyncio.Event) -> None:
        async with gate.hold():
            events.append(f"{name} in")
            await release.wait()
            events.append(f"{name} out")

    async def commit(gate: CommitGate) -> None:
        async with gate.commit():
            events.append("commit")

    async def story() -> None:
        gate, first, second = CommitGate(), asyncio.Event(), asyncio.Event()
        second.set()
        tasks = [asyncio.create_task(hold(gate, "a", first))]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert gate.held
        tasks += [asyncio.create_task(commit(gate)), asyncio.create_task(hold(gate, "b", second))]
        for _ in range(10):
            await asyncio.sleep(0)
        assert events == ["a in"]
        first.set()
        await asyncio.gather(*tasks)

    asyncio.run(story())
    assert events == ["a in", "a out", "commit", "b in", "b out"]


def test_a_holder_that_fails_or_is_cancelled_lets_go():
    async def story() -> bool:
        gate = CommitGate()

        async def failing() -> None:
            async with gate.hold():
                await asyncio.sleep(100)

        task = asyncio.create_task(failing())
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        async with asyncio.timeout(1), gate.commit():
            return not gate.held

    assert asyncio.run(story())


def test_a_cancelled_commit_lets_new_holders_in():
    async def story() -> bool:
        gate, release = CommitGate(), asyncio.Event()

        async def hold() -> None:
            async with gate.hold():
                await release.wait()

        async def commit() -> None:
            async with gate.commit():
                pass

        holder = asyncio.create_task(hold())
        await asyncio.sleep(0.01)
        waiting = asyncio.create_task(commit())
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        async with asyncio.timeout(1), gate.hold():
            release.set()
        await holder
        return True

    assert asyncio.run(story())
