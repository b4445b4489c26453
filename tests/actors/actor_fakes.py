"""An engine, a grader and a broker that answer from a script, for the parts of the actor that need no model."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np

from actors.engine import Sample
from actors.prompts import Prompts
from common.codec import decode, encode
from common.messages import Ack, Assignment, EvalJob, Grant, GroupId, Message, Refused
from common.tasks.templates import Template
from common.wire import RefusedError, Reply


class CharacterTokenizer:
    """One id per character; knows a beginning-of-sequence token that encoding puts first."""

    bos_token = "<s>"

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        ids = [1] if add_special_tokens else []
        if text.startswith(self.bos_token):
            ids, text = [*ids, 1], text.removeprefix(self.bos_token)
        return {"input_ids": ids + [ord(c) for c in text]}


def prompts() -> Prompts:
    return Prompts(CharacterTokenizer(), Template("no", str))


def a_sample(tokens: int = 3, *, finish: str = "stop", text: str = "right", version: int = 0) -> Sample:
    return Sample(
        tokens=np.arange(tokens, dtype=np.int32),
        logprobs=np.full(tokens, -0.5, dtype=np.float32),
        versions=[(version, tokens)],
        finish=finish,
        text=text,
    )


class FakeEngine:
    """Answers after `ticks` turns of the loop; counts the sequences in it."""

    max_context = 100

    def __init__(self, ticks: int = 2) -> None:
        self.ticks = ticks
        self.unfinished = 0
        self.most = 0
        self.hold: asyncio.Event | None = None
        self.failure: Exception | None = None

    async def generate(self, prompt, samples, sampling, *, cache_salt=None, lora=None) -> list[Sample]:
        self.unfinished += samples
        self.most = max(self.most, self.unfinished)
        try:
            for _ in range(self.ticks):
                await asyncio.sleep(0)
            if self.hold is not None:
                await self.hold.wait()
            if self.failure is not None:
                raise self.failure
            return [a_sample(1 + i, text="right" if i % 2 else "wrong") for i in range(samples)]
        finally:
            self.unfinished -= samples


class FakeGrader:
    """`right` is correct, all else is wrong."""

    def __init__(self) -> None:
        self.asked = 0

    async def grade(self, response: str, question: Any) -> Any:
        self.asked += 1
        await asyncio.sleep(0)
        right = response == "right"
        return SimpleNamespace(
            verdict=SimpleNamespace(value="correct" if right else "wrong"), reward=float(right)
        )


class FakeWeights:
    """Weights whose commits wait for whoever has them pinned."""

    cache_salt = None
    lora = None

    def __init__(self, version: int = 0) -> None:
        self.version = version
        self.pins = 0

    @asynccontextmanager
    async def pinned(self):
        self.pins += 1
        yield self.version
        self.pins -= 1


class FakeWire:
    """The broker's side in this process; every message goes through its encoding.

    Attributes:
        questions: left to lease.
        publish: header -> reply, by default accepted.
        counts: requests by kind; `accepted` groups.
    """

    def __init__(self, questions: int = 0, samples: int = 4) -> None:
        self.questions, self.samples = questions, samples
        self.publish: Callable[[Any], Message] = lambda header: Ack(status="accepted")
        self.counts: Counter[str] = Counter()
        self.accepted: Counter[GroupId] = Counter()
        self.headers: list[Any] = []
        self.released: dict[GroupId, str] = {}
        self.evaluation: EvalJob | None = None
        self.problem = "1+1="
        self.lease_reply: Callable[[Any], Message | None] = lambda message: None
        self.keep_headers = True
        self._numbers = itertools.count()

    async def request(self, message, payload=(), *, timeout_s=None, hold_s=0.0) -> Reply:
        message, _ = decode(encode(message, 1))
        self.counts[message.kind] += 1
        await asyncio.sleep(0)
        reply = getattr(self, f"_{message.kind}")(message, payload)
        if asyncio.iscoroutine(reply):
            reply = await reply
        reply, _ = decode(encode(reply, 1))
        if isinstance(reply, Refused):
            raise RefusedError(reply)
        return Reply(reply, [])

    async def _lease(self, message, payload) -> Message:
        if (scripted := self.lease_reply(message)) is not None:
            return scripted
        count = min(self.questions, message.capacity)
        self.questions -= count
        if not count:
            await asyncio.sleep(0.005)
        evaluation, self.evaluation = self.evaluation, None
        return Grant(groups=[self.assignment() for _ in range(count)], evaluation=evaluation)

    def assignment(self) -> Assignment:
        question = {"problem": self.problem, "answer": "2"}
        group = GroupId(0, next(self._numbers))
        return Assignment(group=group, lease=1, question=question, samples=self.samples, deadline_s=60.0)

    def _publish(self, message, payload) -> Message:
        assert tuple(len(part) for part in payload) == message.header.payload_sizes
        reply = self.publish(message.header)
        if isinstance(reply, Ack):
            self.accepted[message.header.group] += 1
            if self.keep_headers:
                self.headers.append(message.header)
        return reply

    def _release(self, message, payload) -> Message:
        self.released |= dict.fromkeys(message.groups, message.reason)
        return Ack()
