"""What the scheduler keeps and hands over, without an engine: vLLM's part is played by scripted outputs."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm")
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.outputs import LogprobsLists

from actors.scheduler import STRIDE, KeepingScheduler

WHOLE = SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, detokenize=False, logprobs=0)
STREAMED = SamplingParams(output_kind=RequestOutputKind.CUMULATIVE, detokenize=False, logprobs=0)
WITH_TEXT = SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, stop=["x"], logprobs=0)


def scheduler_over(patch: pytest.MonkeyPatch) -> KeepingScheduler:
    """A KeepingScheduler over a Scheduler whose steps are given."""
    patch.setattr(Scheduler, "__init__", lambda self: None)
    patch.setattr(
        Scheduler, "add_request", lambda self, request: self.requests.update({request.request_id: request})
    )
    patch.setattr(Scheduler, "update_from_output", lambda self, scheduled, step: outputs_of(step))
    patch.setattr(Scheduler, "has_requests", lambda self: False)
    patch.setattr(
        Scheduler, "finish_requests", lambda self, names, status: [self.requests.pop(name) for name in names]
    )
    made = KeepingScheduler()
    made.requests, made._pause_state = {}, PauseState.UNPAUSED
    return made


@pytest.fixture
def scheduler(monkeypatch) -> KeepingScheduler:
    return scheduler_over(monkeypatch)


def submit(scheduler, name: str, sampling: SamplingParams = WHOLE) -> None:
    scheduler.add_request(SimpleNamespace(request_id=name, sampling_params=sampling))


def outputs_of(step: SimpleNamespace) -> dict[int, EngineCoreOutputs]:
    """As vLLM does: an output per sequence, with its rows of the step's log-probabilities."""
    outputs = []
    for place, (name, token, finish) in enumerate(step.sampled):
        rows = step.logprobs.slice_request(place, 1) if step.logprobs is not None else None
        outputs.append(EngineCoreOutput(name, [token], new_logprobs=rows, finish_reason=finish))
    return {0: EngineCoreOutputs(outputs=outputs)}


def step(scheduler, *sampled: tuple[str, int, FinishReason | None]) -> list[EngineCoreOutput]:
    """One step that samples (name, token, finish) triples: what the front end receives."""
    tokens = np.array([[token] for _, token, _ in sampled])
    names = [name for name, _, _ in sampled]
    drawn = SimpleNamespace(
        sampled=sampled,
        req_id_to_index={name: place for place, name in enumerate(names)},
        logprobs=LogprobsLists(tokens, -tokens.astype(np.float32), tokens[:, 0]) if sampled else None,
    )
    messages = scheduler.update_from_output(
        SimpleNamespace(num_scheduled_tokens=dict.fromkeys(names, 1)), drawn
    )
    assert all(message.outputs for message in messages.values())
    return [output for message in messages.values() for output in message.outputs]


def logprobs(output: EngineCoreOutput) -> list[float]:
    return output.new_logprobs.logprobs[:, 0].tolist()


def test_a_response_arrives_once_with_all_its_tokens(scheduler) -> None:
    submit(scheduler, "a")
    assert step(scheduler, ("a", 1, None)) == []
    assert step(scheduler, ("a", 2, None)) == []
    (whole,) = step(scheduler, ("a", 3, FinishReason.STOP))
    assert (whole.new_token_ids, whole.finish_reason) == ([1, 2, 3], FinishReason.STOP)
    assert logprobs(whole) == [-1.0, -2.0, -3.0]
    assert whole.new_logprobs.sampled_token_ranks.tolist() == [1, 2, 3]


@pytest.mark.parametrize("sampling", [STREAMED, WITH_TEXT])
def test_what_is_read_on_the_way_passes_at_once(scheduler, sampling) -> None:
    submit(scheduler, "a", sampling)
    submit(scheduler, "b")
    (passed,) = step(scheduler, ("a", 1, None), ("b", 5, None))
    assert (passed.request_id, passed.new_token_ids, logprobs(passed)) == ("a", [1], [-1.0])
    step(scheduler, ("b", 6, None))
    (whole,) = [out for out in step(scheduler, ("a", 2, None), ("b", 7, FinishReason.STOP)) if out.finished]
    assert (whole.new_token_ids, logprobs(whole)) == ([5, 6, 7], [-5.0, -6.0, -7.0])


def test_a_pause_waits_until_everything_is_handed_over(scheduler) -> None:
    submit(scheduler, "a")
    step(scheduler, ("a", 1, None))
    assert not scheduler.has_requests()
    scheduler.set_pause_state(PauseState.PAUSED_ALL)
    assert scheduler.has_requests()
    assert [out.new_token_ids for out in step(scheduler)] == [[1]]
    assert not scheduler.has_requests()
    scheduler.set_pause_state(PauseState.UNPAUSED)
    (rest,) = step(scheduler, ("a", 2, FinishReason.STOP))
    assert rest.new_token_ids == [2]


def test_of_an_aborted_request_nothing_comes_any_more(scheduler) -> None:
    submit(scheduler, "a")
    step(scheduler, ("a", 1, None))
    scheduler.finish_requests(["a"], None)
    scheduler.set_pause_state(PauseState.PAUSED_ALL)
    assert not scheduler.has_requests()
    assert step(scheduler) == []


@given(
    lengths=st.lists(st.integers(1, 3 * STRIDE), min_size=1, max_size=5), pauses=st.sets(st.integers(0, 90))
)
def test_no_token_is_lost_doubled_late_or_put_in_another_order(lengths: list[int], pauses: set[int]) -> None:
    arrived: dict[str, list[int]] = {str(i): [] for i in range(len(lengths))}
    scores: dict[str, list[float]] = {str(i): [] for i in range(len(lengths))}
    with pytest.MonkeyPatch.context() as patch:
        made = scheduler_over(patch)
        for name in arrived:
            submit(made, name)
        for now in range(max(lengths)):
            running = [(str(i), now, ends(now, length)) for i, length in enumerate(lengths) if now < length]
            outputs = step(made, *running)
            if now in pauses:
                outputs += pause(made)
            for output in outputs:
                arrived[output.request_id] += output.new_token_ids
                scores[output.request_id] += logprobs(output)
            assert all(now - len(arrived[name]) < STRIDE for name, _, _ in running)
    for i, length in enumerate(lengths):
        assert arrived[str(i)] == list(range(length))
        assert scores[str(i)] == [-float(token) for token in range(length)]


def ends(now: int, length: int) -> FinishReason | None:
    return FinishReason.LENGTH if now == length - 1 else None


def pause(made: KeepingScheduler) -> list[EngineCoreOutput]:
    """Pauses and resumes; what the front end receives before the pause is complete."""
    made.set_pause_state(PauseState.PAUSED_ALL)
    outputs = step(made) if made.has_requests() else []
    assert not made.has_requests()
    made.set_pause_state(PauseState.UNPAUSED)
    return outputs
