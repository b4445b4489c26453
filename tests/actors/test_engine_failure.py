"""Why an engine did not start: one sentence, the cause rather than the news of it."""

from __future__ import annotations

import logging
import os
import signal

import pytest
from pydantic import BaseModel, ValidationError

from actors.engine import how_it_died
from actors.failure import VARIABLE, EngineErrors, keep_errors

HEARSAY = "Engine core initialization failed. See root cause above. Failed core proc(s): {}"


def say(logger: str, error: Exception) -> None:
    """What vLLM does with an error in a process of the engine."""
    try:
        raise error
    except Exception:
        logging.getLogger(logger).exception("it failed")


@pytest.fixture(autouse=True)
def _kept() -> None:
    keep_errors()
    keep_errors()


def test_the_cause_comes_from_the_process_where_it_happened() -> None:
    with EngineErrors() as errors:
        if not (child := os.fork()):
            say("vllm.v1.engine.core", ValueError("no room for the KV cache\nmore words"))
            os._exit(1)
        os.waitpid(child, 0)
        assert errors.reason(RuntimeError(HEARSAY)) == "ValueError: no room for the KV cache"


def test_of_several_processes_the_first_real_error_counts() -> None:
    with EngineErrors() as errors:
        say("vllm.v1.executor.multiproc_executor", MemoryError("CUDA out of memory"))
        say("vllm.v1.engine.core", RuntimeError("WorkerProc failed. See stack trace for root cause."))
        assert errors.reason(RuntimeError(HEARSAY)) == "MemoryError: CUDA out of memory"
    assert VARIABLE not in os.environ


def test_news_without_a_cause_is_told_as_it_came() -> None:
    with EngineErrors() as errors:
        say("vllm.v1.engine.core", RuntimeError("See root cause above"))
        assert errors.reason(RuntimeError(HEARSAY)) == HEARSAY


def test_a_killed_process() -> None:
    text = HEARSAY.replace("{}", "{'EngineCore_DP0': -9}")
    with EngineErrors() as errors:
        assert errors.reason(RuntimeError(text)) == "its process was ended by SIGKILL (out of memory?)"


def test_a_setting_that_vllm_refuses() -> None:
    class Config(BaseModel):
        max_model_len: int

    with pytest.raises(ValidationError) as caught:
        Config(max_model_len="many words in here")
    with EngineErrors() as errors:
        assert errors.reason(caught.value).startswith("Input should be a valid integer")


def test_what_is_logged_when_nobody_asks_goes_nowhere() -> None:
    say("vllm.v1.engine.core", ValueError("x"))
    with EngineErrors() as errors:
        assert errors.reason(RuntimeError("own words")) == "own words"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-int(signal.SIGILL), '(SIGILL: an instruction that this processor lacks; model.dtype = "float32"'),
        (-int(signal.SIGKILL), "(SIGKILL: often the kernel's, for want of memory)"),
        (-int(signal.SIGSEGV), "(SIGSEGV)"),
        (3, "(exit code 3)"),
    ],
)
def test_the_end_of_an_engine_says_how(code: int, words: str) -> None:
    assert words in how_it_died(code)
