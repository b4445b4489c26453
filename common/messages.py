"""Everything that actors, broker and learner say to one another.

Invariant: a message that decodes is well-formed (types, ranges, sizes, finite numbers); anything else raises
`MalformedMessage` with the reason and touches no state (I8). Headers are msgpack; payloads are raw buffers
that the broker checks by size and never decodes. No pickle.

Each request has exactly one reply, its own reply type or `Refused`. Requests are idempotent: a peer that gets
no reply sends the same request again. Versions count weight pushes since the base model (version 0); the era
goes up whenever the learner rewinds, so (era, version) names one policy for good.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

import msgpack
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    Strict,
    ValidationError,
    field_validator,
    model_validator,
)

from common.errors import SlipstreamError

PROTOCOL = 1
MAX_HEADER_BYTES = 16 << 20

Count = Annotated[int, Field(ge=0, le=2**53)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Text = Annotated[str, Field(max_length=1 << 20)]
Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Cause = Literal["leaving", "failed", "unanswerable"]
Verdict = Literal["correct", "wrong", "unformatted", "truncated", "unverified"]


class MalformedMessage(SlipstreamError):  # noqa: N818 - it names what arrived
    """What arrived is not a message of this protocol; the text says why."""


class GroupId(NamedTuple):
    """A question in an epoch: `epoch` passes over the set before it, `index` into the question set."""

    epoch: int
    index: int

    def __str__(self) -> str:
        return f"{self.epoch}:{self.index}"


class Part(BaseModel):
    """A piece of a message: strict types, no unknown fields, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Message(Part):
    """A message: its kind is the snake-case name on the wire."""

    kind: ClassVar[str]
    _kinds: ClassVar[dict[str, type[Message]]] = {}

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        cls.kind = "".join(f"_{c.lower()}" if c.isupper() else c for c in cls.__name__).lstrip("_")
        Message._kinds[cls.kind] = cls


def _group_id(value: Any) -> GroupId:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError("a group is a pair (epoch, index)")
    for part in value:
        if not isinstance(part, int) or isinstance(part, bool) or not 0 <= part < 2**53:
            raise ValueError("epoch and index are whole numbers from 0")
    return GroupId(*value)


GroupKey = Annotated[GroupId, PlainValidator(_group_id)]


# (version, tokens). Not strict, as msgpack has lists where Python has tuples; its numbers are strict still.
VersionRun = Annotated[tuple[Count, Annotated[int, Field(ge=1, le=2**53)]], Strict(False)]


# --- parts -----------------------------------------------------------------------------------------------


class WeightsAddress(Part):
    """Where weights of an era are served: `address` "host:port" of the rendezvous, `token` its secret."""

    address: Name
    token: Name
    era: Count


class Assignment(Part):
    """One leased question: sample `samples` responses of it within `deadline_s` seconds."""

    group: GroupKey
    lease: Count = Field(
        description="Which lease of the group this is; a later lease makes an earlier one void."
    )
    question: dict[str, Any] = Field(
        description="At least `problem` and `answer`; custom rewards see all of it."
    )
    samples: Annotated[int, Field(ge=1, le=65536)]
    deadline_s: Seconds

    @field_validator("question")
    @classmethod
    def _has_problem(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(value.get("problem"), str):
            raise ValueError("question has no `problem` text")
        return value


class EvalQuestion(Part):
    """A held-out question of the set `set`."""

    set: Name
    uid: Name
    question: dict[str, Any]


class EvalJob(Part):
    """An evaluation to be answered by one actor at one version, `requested` or later."""

    job: Count
    requested: Count
    questions: list[EvalQuestion]
    samples: Count
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    max_tokens: Annotated[int, Field(ge=1)]


class Scored(Part):
    """A scored response: `tokens` generated, in tokens."""

    verdict: Verdict
    reward: Number
    tokens: Count
    text: Text | None = None


class EvalRow(Part):
    """Answers to one held-out question: one greedy, and the sampled ones."""

    set: Name
    uid: Name
    greedy: Scored
    sampled: list[Scored]


class ResponseHeader(Part):
    """One response: `tokens` sampled, `versions` run-length pairs (version, tokens) that add up to it."""

    tokens: Annotated[int, Field(ge=1, le=1 << 22)]
    reward: Number
    verdict: Verdict
    finish: Literal["stop", "length"]
    versions: list[VersionRun]

    @model_validator(mode="after")
    def _versions_cover_the_tokens(self) -> ResponseHeader:
        if sum(count for _, count in self.versions) != self.tokens:
            raise ValueError("version runs do not add up to the tokens of the response")
        return self


class GroupHeader(Part):
    """A scored group. Its payload is three buffers: prompt ids int32 [P]; response ids int32 [sum T];
    behaviour log-probabilities float32 [sum T] (nats, of the distribution really sampled from)."""

    group: GroupKey
    lease: Count
    era: Count
    actor: Name
    prompt_tokens: Annotated[int, Field(ge=1, le=1 << 22)]
    responses: Annotated[list[ResponseHeader], Field(min_length=1, max_length=65536)]
    generate_s: Seconds = 0.0
    verify_s: Seconds = 0.0

    @property
    def response_tokens(self) -> int:
        """Tokens of all responses."""
        return sum(r.tokens for r in self.responses)

    @property
    def payload_sizes(self) -> tuple[int, int, int]:
        """Bytes of the three payload buffers."""
        return 4 * self.prompt_tokens, 4 * self.response_tokens, 4 * self.response_tokens

    @property
    def min_version(self) -> int:
        """Oldest version that sampled a token of the group."""
        return min(version for r in self.responses for version, _ in r.versions)

    @property
    def max_version(self) -> int:
        """Newest version that sampled a token of the group."""
        return max(version for r in self.responses for version, _ in r.versions)


# --- requests of every peer -------------------------------------------------------------------------------


class Hello(Message):
    """First message of a peer; `run` refuses to join any other run, `tokenizer` is a digest that must agree."""

    role: Literal["actor", "learner", "observer"]
    peer: Name
    software: Name
    host: Name
    pid: Count
    run: Name | None = None
    tokenizer: Name | None = None


class Heartbeat(Message):
    """Sign of life: what the peer does (`state`), whom it waits for and how long, its leases, its meters."""

    state: Name
    waiting_for: Name | None = None
    waiting_s: Seconds = 0.0
    version: Count = 0
    era: Count = 0
    leases: Annotated[list[GroupKey], Field(max_length=100_000)] = []
    telemetry: Annotated[dict[str, Number], Field(max_length=500)] = {}


class Goodbye(Message):
    """The peer leaves; its leases go back."""

    reason: Text


class Stop(Message):
    """End the run in order: actors and learner are told to stop, the learner writes a checkpoint."""

    reason: Text


class StatusQuery(Message):
    """What is going on; `groups` lists the buffer too."""

    groups: bool = False


class GroupQuery(Message):
    """One group whole: header, question and payload."""

    group: GroupKey


# --- requests of an actor ---------------------------------------------------------------------------------


class Lease(Message):
    """Ask for up to `capacity` groups; the broker answers at once or holds the request for `wait_s`."""

    capacity: Count
    version: Count
    era: Count
    wait_s: Seconds


class Publish(Message):
    """A scored group, with its payload."""

    header: GroupHeader


class Release(Message):
    """Hand back leases that will not be answered.

    `cause` is for the broker: `leaving` is not held against a question, `failed` counts towards
    `broker.max_attempts`, `unanswerable` (no actor could, such as a prompt that is too long) gives it up at once.
    """

    groups: list[GroupKey]
    reason: Text
    cause: Cause = "failed"


class EvalResult(Message):
    """Answers to an evaluation job, all sampled at `version`."""

    job: Count
    version: Count
    era: Count
    rows: list[EvalRow]
    seconds: Seconds


# --- requests of the learner ------------------------------------------------------------------------------


class Rewind(Message):
    """The learner starts (or starts again) from the checkpoint of `step`; opens a new era."""

    step: Count
    version: Count


class Serve(Message):
    """Weights of this era are served here."""

    weights: WeightsAddress


class Take(Message):
    """Ask for the groups of `step`; held for at most `wait_s`. The same step again gets the same groups."""

    step: Count
    wait_s: Seconds


class Fetch(Message):
    """Ask for payloads of taken groups: three buffers per group, in order."""

    groups: list[GroupKey]


class Commit(Message):
    """Step done: its groups are consumed and `version` (= step + 1) exists; `metrics` of the step."""

    step: Count
    version: Count
    metrics: dict[str, Number]
    samples: list[dict[str, Any]] = []


class Pin(Message):
    """A checkpoint of `step` (the state before step `step`) is safe at `path`: the history before it is final."""

    step: Count
    path: Text


# --- replies ----------------------------------------------------------------------------------------------


class Refused(Message):
    """The request was not carried out; `code` is for programs, `reason` for people."""

    code: Literal[
        "malformed",
        "unknown_peer",
        "incompatible",
        "not_now",
        "stale",
        "conflict",
        "shut_out",
        "full",
        "internal",
    ]
    reason: Text


class Ack(Message):
    """Done. For a group: accepted, duplicate, filtered (zero variance), or expired (too stale; re-leased)."""

    status: Literal["ok", "accepted", "duplicate", "filtered", "expired"] = "ok"
    reason: Text | None = None


class Welcome(Message):
    """The peer is in: the whole recipe, where the run stands, where weights come from."""

    run: Name
    recipe: dict[str, Any]
    folder: Text
    step: Count
    version: Count
    era: Count
    weights: WeightsAddress | None
    heartbeat_s: Seconds
    resumed: bool


class Pulse(Message):
    """Answer to a heartbeat. `command`: go on, drain (finish, lease nothing more, leave) or stop now."""

    step: Count
    version: Count
    era: Count
    weights: WeightsAddress | None
    command: Literal["run", "drain", "stop"]
    reason: Text | None = None


class Grant(Message):
    """Leased groups, possibly none (`reason` then says what the actor waits for), and an evaluation."""

    groups: list[Assignment]
    evaluation: EvalJob | None = None
    reason: Text | None = None


class Batch(Message):
    """The groups of `step`. `scheduled` groups count in N; `filtered` of them had zero variance and are not sent.

    `ready` is false when the wait ran out: `reason` says who is waited for.
    """

    step: Count
    ready: bool
    groups: list[GroupHeader] = []
    scheduled: Count = 0
    filtered: Count = 0
    filtered_rewards: list[Number] = []
    reason: Text | None = None


class Payloads(Message):
    """Three buffers for each of `groups`, in order."""

    groups: list[GroupKey]


class Rewound(Message):
    """The history now ends before `step`; the learner serves weights under `era`."""

    step: Count
    era: Count
    reopened: Count
    dropped: Count


class Status(Message):
    """A snapshot of the run for people and launchers; the keys are documented in docs/operating.md."""

    status: dict[str, Any]


class GroupView(Message):
    """One group for inspection; the payload is the group's three buffers where the broker still has them."""

    state: Name
    question: dict[str, Any]
    header: GroupHeader | None


# --- encoding ---------------------------------------------------------------------------------------------

M = TypeVar("M", bound=Message)


def encode(message: Message, request: int) -> bytes:
    """The header frame of a message; `request` pairs a reply with its request."""
    body = message.model_dump(mode="python")
    return msgpack.packb([PROTOCOL, message.kind, request, body], use_bin_type=True)


def decode(frame: bytes | memoryview) -> tuple[Message, int]:
    """The message in a header frame and its request number.

    Raises:
        MalformedMessage: not msgpack, another protocol, an unknown kind, or a body that breaks its schema.
    """
    if len(frame) > MAX_HEADER_BYTES:
        raise MalformedMessage(f"header of {len(frame)} bytes; at most {MAX_HEADER_BYTES} are accepted")
    try:
        outer = msgpack.unpackb(bytes(frame), raw=False)
    except Exception as error:  # msgpack raises many kinds; all of them mean the same here
        raise MalformedMessage(f"not msgpack: {type(error).__name__}") from None
    if not isinstance(outer, list) or len(outer) != 4:
        raise MalformedMessage("not a message of Slipstream")
    protocol, kind, request, body = outer
    if protocol != PROTOCOL:
        raise MalformedMessage(f"protocol {protocol!r}; this software speaks {PROTOCOL}")
    if not isinstance(request, int) or isinstance(request, bool) or not 0 <= request < 2**63:
        raise MalformedMessage("request number out of range")
    model = Message._kinds.get(kind) if isinstance(kind, str) else None
    if model is None:
        raise MalformedMessage(f"unknown kind {str(kind)[:40]!r}")
    return _validate(model, body), request


def _validate(model: type[M], body: Any) -> M:
    if not isinstance(body, dict):
        raise MalformedMessage(f"{model.kind}: the body is not a map")
    try:
        return model.model_validate(body)
    except (ValidationError, RecursionError) as error:
        raise MalformedMessage(f"{model.kind}: {_first_defect(error)}") from None


def _first_defect(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return "nested too deeply"
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"]


def check_payload(header: GroupHeader, payload: list[bytes] | list[memoryview]) -> None:
    """Raise `MalformedMessage` unless the three buffers have the sizes that the header says."""
    sizes = tuple(len(buffer) for buffer in payload)
    if sizes != header.payload_sizes:
        raise MalformedMessage(f"payload of {sizes} bytes where the header says {header.payload_sizes}")
