"""The pool: order, deadlines, crashes, custom rewards, cache, clean ends."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from common.errors import UserError
from common.verifier import Outcome, Verdict, VerifierPool, load_reward
from tests.scripted.wait import alive, until

DEADLINE_S = 3.0  # waited out by what hangs; on a busy machine a good response may take a while
HERE = Path(__file__).parent
ROOT = HERE.parents[2]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reward functions beside this file are importable here and, by the path that spawn hands on, in workers."""
    monkeypatch.syspath_prepend(str(HERE))


def _workers() -> set[int]:
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has gone meanwhile
            if "spawn_main" in " ".join(process.cmdline()):
                found.add(process.pid)
    return found


def test_verdicts_come_in_order_and_repeats_from_the_cache() -> None:
    pairs = [(rf"\boxed{{{k}/2}}", f"{k / 2}") for k in range(30)] + [
        ("nothing", "1"),
        (r"\boxed{\frac12}", "0.4"),
    ]
    with VerifierPool(workers=2) as pool:
        first, again = pool.grade_many(pairs), pool.grade_many(pairs)
    assert [v.verdict for v in first] == [Outcome.CORRECT] * 30 + [Outcome.UNFORMATTED, Outcome.WRONG]
    assert [v.verdict for v in again] == [v.verdict for v in first]
    assert first[5].seconds > 0
    assert {v.seconds for v in again} == {0.0}


def test_the_event_loop_goes_on_while_a_response_is_verified() -> None:
    async def main() -> tuple[list[Verdict], int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticker = asyncio.create_task(tick())
        with VerifierPool(workers=1, deadline_s=DEADLINE_S, reward="reward_functions:by_name") as pool:
            verdicts = await asyncio.gather(
                *(pool.grade(r, {"answer": "1"}) for r in ("fine", "sleep", "fine"))
            )
        ticker.cancel()
        return verdicts, ticks

    verdicts, ticks = asyncio.run(main())
    assert [v.verdict for v in verdicts] == [Outcome.CORRECT, Outcome.UNVERIFIED, Outcome.CORRECT]
    assert ticks > 10


def test_a_cancelled_caller_leaves_the_pool_working() -> None:
    async def main() -> Verdict:
        with VerifierPool(workers=1, deadline_s=DEADLINE_S, reward="reward_functions:by_name") as pool:
            task = asyncio.create_task(pool.grade("sleep", {}))
            await asyncio.sleep(0.3)
            task.cancel()
            return await pool.grade("fine", {})

    assert asyncio.run(main()).verdict is Outcome.CORRECT


BROKEN = {
    "raise": "no such luck",
    "hang": "deadline",
    "exit": "exit code 3",
    "nan": "not a finite number",
    "text": "not a finite number",
    "none": "not a finite number",
    "odd": "unknown verdict",
}


def test_a_broken_reward_is_unverified_and_the_pool_goes_on() -> None:
    with VerifierPool(workers=1, deadline_s=DEADLINE_S, reward="reward_functions:by_name") as pool:
        *broken, good = pool.grade_many([(response, {}) for response in (*BROKEN, "fine")])
    for verdict, reason in zip(broken, BROKEN.values(), strict=True):
        assert verdict.verdict is Outcome.UNVERIFIED
        assert verdict.reward == 0.0
        assert reason in (verdict.reason or "")
    assert good.verdict is Outcome.CORRECT


def test_custom_rewards_see_the_question_and_may_name_the_verdict() -> None:
    with VerifierPool(workers=1, reward="reward_functions:length") as pool:
        (verdict,) = pool.grade_many([("1234", {"length": 8})])
    assert (verdict.verdict, verdict.reward) == (Outcome.WRONG, 0.5)
    with VerifierPool(workers=1, reward="reward_functions:named") as pool:
        first, second = pool.grade_many([("?", {}), ("5", {})])
    assert (first.verdict, first.reward) == (Outcome.UNFORMATTED, 0.1)
    assert (second.verdict, second.reward) == (Outcome.CORRECT, 1.0)


def test_a_reward_that_cannot_be_loaded() -> None:
    for path in ("reward_functions", "no_such_module:f", "reward_functions:missing", "os:sep"):
        with pytest.raises(UserError, match="reward"):
            load_reward(path)
    with VerifierPool(workers=1, reward="no_such_module:f") as pool:
        (verdict,) = pool.grade_many([("x", {})])
    assert verdict.verdict is Outcome.UNVERIFIED
    assert "no_such_module" in (verdict.reason or "")


def test_closing_ends_the_workers_and_what_waits_is_unverified() -> None:
    before = _workers()
    pool = VerifierPool(workers=2, deadline_s=30, reward="reward_functions:by_name")
    assert pool.grade_many([("fine", {})])[0].verdict is Outcome.CORRECT
    until(lambda: len(_workers() - before) == 2)
    _, waiting = pool._grading("sleep", {})
    pool.close()
    pool.close()
    until(lambda: not _workers() - before)
    assert not isinstance(waiting, Verdict)
    assert pool._collect(None, waiting).verdict is Outcome.UNVERIFIED
    assert pool.grade_many([("fine", {})])[0].verdict is Outcome.UNVERIFIED


def test_workers_die_with_a_killed_parent_and_import_no_engine(tmp_path: Path) -> None:
    """The parent's main module would import torch in every worker if spawn had its way."""
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, time
            if __name__ != "__main__":
                open(sys.argv[1] + ".reimported", "w").close()
            import psutil
            from common.verifier import VerifierPool
            pool = VerifierPool(workers=2, deadline_s=60, reward="reward_functions:by_name")
            pool.grade_many([("fine", {})] * 4)
            pool._grading("hang", {})
            time.sleep(0.5)
            print(*[p.pid for p in psutil.Process().children(recursive=True)], flush=True)
            time.sleep(60)
            """
        )
    )
    path = os.pathsep.join((str(ROOT), str(HERE)))
    parent = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "mark")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert parent.stdout is not None
    children = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(children) >= 2
    parent.kill()
    parent.wait()
    until(lambda: not alive(children))
    assert not (tmp_path / "mark.reimported").exists()


def test_importing_the_verifier_imports_no_engine() -> None:
    code = "import sys, common.verifier; print([m for m in ('torch', 'vllm', 'transformers', 'math_verify') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_bad_options_name_the_setting() -> None:
    with pytest.raises(UserError, match=r"verifier\.workers"):
        VerifierPool(workers=0)
    with pytest.raises(UserError, match=r"verifier\.deadline_s"):
        VerifierPool(deadline_s=0)
    with pytest.raises(UserError, match=r"verifier\.level"):
        VerifierPool(level="best")  # type: ignore[arg-type]


def test_a_bounded_cache_forgets_the_oldest() -> None:
    with VerifierPool(workers=1, cache_size=3) as pool:
        pool.grade_many([(rf"\boxed{{{k}/2}}", f"{k / 2}") for k in range(1, 9)])
        assert len(pool._cache) == 3
