"""Everything that actors, broker and learner say to one another.

Invariant: a message that decodes is well-formed (types, ranges, sizes, finite numbers); anything else raises
`MalformedMessage` with the reason and touches no state (I8). Headers are msgpack; payloads are raw buffers
that the broker checks by size and never decodes. No pickle.

Each request has exactly one reply, its own reply type or `Refused`. Requests are idempotent: a peer that gets
no reply sends the same request again. Versions count weight pushes since the base model (version 0); the era
goes up whenever the learner rewinds, so (era, version) names one policy for good.
"""

from __future__ import annotations

import functools
from numbers import Integral, Real
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from common.errors import SlipstreamError

PROTOCOL = 1
MAX_HEADER_BYTES = 16 << 20
MAX_STACKS_CHARS = 1 << 20

# msgspec compares with these bounds and a NaN passes no comparison, so what is bounded is finite.
_LARGEST = 1.7e308

Count = Annotated[int, Meta(ge=0, le=2**53)]
Tokens = Annotated[int, Meta(ge=1, le=1 << 22)]
Name = Annotated[str, Meta(min_length=1, max_length=200)]
Text = Annotated[str, Meta(max_length=1 << 20)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
Number = Annotated[float, Meta(ge=-_LARGEST, le=_LARGEST)]
Samples = Annotated[int, Meta(ge=1, le=65536)]
Temperature = Annotated[float, Meta(gt=0, le=1e9)]
Cause = Literal["leaving", "failed", "unanswerable"]
Verdict = Literal["correct", "wrong", "unformatted", "truncated", "unverified"]


class MalformedMessage(SlipstreamError):  # noqa: N818 - it names what arrived
    """What arrived is not a message of this protocol; the text says why."""


class GroupId(NamedTuple):
    """A question in an epoch: `epoch` passes over the set before it, `index` into the question set."""

    epoch: Count
    index: Count

    def __str__(self) -> str:
        return f"{self.epoch}:{self.index}"


class VersionRun(NamedTuple):
    """So many consecutive tokens of a response were sampled by this version."""

    version: Count
    tokens: Tokens


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A piece of a message: strict types when it is decoded, no unknown fields, immutable."""


class Message(Part):
    """A message: its kind is the snake-case name on the wire."""

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[Message]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.kind = "".join(f"_{c.lower()}" if c.isupper() else c for c in cls.__name__).lstrip("_")
        Message.kinds[cls.kind] = cls


# --- parts -----------------------------------------------------------------------------------------------


class WeightsAddress(Part):
    """Where weights of an era are served: `address` "host:port" of the rendezvous, `token` its secret."""

    address: Name
    token: Name
    era: Count


class Assignment(Part):
    """One leased question: sample `samples` responses of it within `deadline_s` seconds.

    `lease` says which lease of the group this is: a later one makes an earlier one void. `question` has at least
    `problem` and `answer`; a reward of the user's own sees all of it.
    """

    group: GroupId
    lease: Count
    question: dict[str, Any]
    samples: Samples
    deadline_s: Seconds

    def __post_init__(self) -> None:
        if not isinstance(self.question.get("problem"), str):
            raise ValueError("question has no `problem` text")


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
    temperature: Temperature
    max_tokens: Annotated[int, Meta(ge=1)]


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

    tokens: Tokens
    reward: Number
    verdict: Verdict
    finish: Literal["stop", "length"]
    versions: list[VersionRun]


class GroupHeader(Part):
    """A scored group. Its payload is three buffers: prompt ids int32 [P]; response ids int32 [sum T];
    behaviour log-probabilities float32 [sum T] (nats, of the distribution really sampled from)."""

    group: GroupId
    lease: Count
    era: Count
    actor: Name
    prompt_tokens: Tokens
    responses: Annotated[list[ResponseHeader], Meta(min_length=1, max_length=65536)]
    generate_s: Seconds = 0.0
    verify_s: Seconds = 0.0

    def __post_init__(self) -> None:
        for response in self.responses:  # here and not in each of them: one call for a group
            covered = 0
            for _, tokens in response.versions:
                covered += tokens
            if covered != response.tokens:
                raise ValueError("version runs do not add up to the tokens of the response")

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
    """First message of a peer; `run` refuses to join any other run, `tokenizer` is a digest that must agree.

    `process` is random and one for all connections of a process (`common.wire` fills it in): a process number alone
    says little where each container counts from 1.
    """

    role: Literal["actor", "learner", "observer"]
    peer: Name
    software: Name
    host: Name
    pid: Count
    run: Name | None = None
    tokenizer: Name | None = None
    process: Annotated[str, Meta(max_length=32)] = ""


class Heartbeat(Message):
    """Sign of life: what the peer does (`state`), whom it waits for and how long, its leases, its meters.

    `time` is the peer's wall clock (seconds since the epoch): the broker warns of a clock that is off.
    """

    state: Name
    waiting_for: Name | None = None
    waiting_s: Seconds = 0.0
    version: Count = 0
    era: Count = 0
    leases: Annotated[list[GroupId], Meta(max_length=100_000)] = []
    telemetry: Annotated[dict[str, Number], Meta(max_length=500)] = {}
    time: Number | None = None


class Goodbye(Message):
    """The peer leaves; its leases go back."""

    reason: Text


class Stop(Message):
    """End the run in order: actors and learner are told to stop, the learner writes a checkpoint."""

    reason: Text


class StatusQuery(Message):
    """What is going on; `groups` lists the buffer too."""

    groups: bool = False


class Stacks(Message):
    """Where every thread of the peer's processes stands: the answer to `Pulse.dump_stacks` = `request`."""

    request: Name
    text: Annotated[str, Meta(max_length=MAX_STACKS_CHARS)]


class Drain(Message):
    """These actors shall finish what they have, lease nothing more, and leave."""

    actors: Annotated[list[Name], Meta(max_length=5000)]
    reason: Text


class GroupQuery(Message):
    """One group whole: header, question and payload."""

    group: GroupId


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
    `evaluation` is a job that will not be answered either.
    """

    groups: list[GroupId]
    reason: Text
    cause: Cause = "failed"
    evaluation: Count | None = None


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

    groups: list[GroupId]


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
    """The request was not carried out; `code` is for programs, `reason` for people.

    A `not_now` may be another answer within `passes_s`: to keep asking for so long is worth while.
    """

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
    passes_s: Seconds = 0.0


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
    """Answer to a heartbeat. `command`: go on, drain (finish, lease nothing more, leave) or stop now.

    `dump_stacks` asks for the peer's stacks (`Stacks`), once per value. `actors`, for the learner alone, are the
    actors that are in the run.
    """

    step: Count
    version: Count
    era: Count
    weights: WeightsAddress | None
    command: Literal["run", "drain", "stop"]
    reason: Text | None = None
    dump_stacks: Name | None = None
    actors: list[Name] | None = None


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

    groups: list[GroupId]


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

P = TypeVar("P", bound="Part")


def _plain(value: Any) -> Any:
    """Numbers of other libraries (NumPy's), as those of Python."""
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise TypeError(f"a message cannot carry a {type(value).__name__}")


_encoder = msgspec.msgpack.Encoder(enc_hook=_plain)
# The body is left as it is until its kind is known. Skipping over it proves that it is whole, so that no count
# in it is larger than its bytes and nothing is allocated for what is not there.
_outer = msgspec.msgpack.Decoder(tuple[int, str, int, msgspec.Raw])


@functools.cache
def _decoder(model: type[Part]) -> msgspec.msgpack.Decoder:
    return msgspec.msgpack.Decoder(model)


def encode(message: Message, request: int) -> bytes:
    """The header frame of a message; `request` pairs a reply with its request."""
    return _encoder.encode((PROTOCOL, message.kind, request, message))


def encode_plain(kind: str, request: int, body: Any) -> bytes:
    """The same for a body of plain values and `msgspec.Raw` pieces that were validated when they came in."""
    return _encoder.encode((PROTOCOL, kind, request, body))


def decode(frame: bytes | memoryview) -> tuple[Message, int]:
    """The message in a header frame and its request number.

    Raises:
        MalformedMessage: not msgpack, another protocol, an unknown kind, or a body that breaks its schema.
    """
    kind, request, body = open_frame(frame)
    model = Message.kinds.get(kind)
    if model is None:
        raise MalformedMessage(f"unknown kind {kind[:40]!r}")
    return decode_part(model, body, kind), request


def open_frame(frame: bytes | memoryview) -> tuple[str, int, msgspec.Raw]:
    """Kind, request number and undecoded body of a header frame; raises `MalformedMessage`."""
    if len(frame) > MAX_HEADER_BYTES:
        raise MalformedMessage(f"header of {len(frame)} bytes; at most {MAX_HEADER_BYTES} are accepted")
    try:
        protocol, kind, request, body = _outer.decode(frame)
    except msgspec.ValidationError as error:
        raise MalformedMessage(f"not a message of Slipstream: {_defect(error)}") from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise MalformedMessage("not msgpack") from None
    if protocol != PROTOCOL:
        raise MalformedMessage(f"protocol {protocol!r}; this software speaks {PROTOCOL}")
    if not 0 <= request < 2**63:
        raise MalformedMessage("request number out of range")
    return kind, request, body


def request_number(frame: bytes) -> int:
    """The request number of a message that is otherwise malformed, so that its sender learns why; else 0."""
    try:
        number = _outer.decode(frame)[2]
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return 0
    return number if 0 <= number < 2**63 else 0


def decode_part(model: type[P], body: bytes | msgspec.Raw, what: str) -> P:
    """A body or a piece of one, checked against its schema; raises `MalformedMessage`, which names `what`."""
    try:
        return _decoder(model).decode(body)
    except RecursionError:
        raise MalformedMessage(f"{what}: nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedMessage(f"{what}: {_defect(error)}") from None


def _defect(error: Exception) -> str:
    """msgspec's sentence with the place first: "header.lease: expected `int`"."""
    what, _, place = str(error).partition(" - at `$")
    what = what[:1].lower() + what[1:]
    where = place.rstrip("`").lstrip(".")
    return f"{where}: {what}" if where else what


def check_payload(header: GroupHeader, payload: list[bytes] | list[memoryview]) -> None:
    """Raise `MalformedMessage` unless the three buffers have the sizes that the header says."""
    sizes = tuple(len(buffer) for buffer in payload)
    if sizes != header.payload_sizes:
        raise MalformedMessage(f"payload of {sizes} bytes where the header says {header.payload_sizes}")
