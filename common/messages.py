"""Everything that actors, broker and learner say to one another.

Invariant: a message that decodes is well-formed (types, ranges, sizes, finite numbers); anything else raises
`MalformedMessage` with the reason and touches no state (I8). Headers are msgpack (`common.codec`); payloads are raw buffers
that the broker checks by size and never decodes. No pickle.

Each request has exactly one reply, its own reply type or `Refused`. Requests are idempotent: a peer that gets
no reply sends the same request again. Versions count weight pushes since the base model (version 0); the era
goes up whenever the learner rewinds, so (era, version) names one policy for good.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import msgspec
from msgspec import Meta

from common.errors import SlipstreamError

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
    index: Count  # type: ignore[assignment]  # a tuple's method of that name is of no use here

    def __str__(self) -> str:
        return f"{self.epoch}:{self.index}"


class VersionRun(NamedTuple):
    """So many consecutive tokens of a response were sampled by this version."""

    version: Count
    tokens: Tokens


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A piece of a message: strict types when it is decoded, no unknown fields, immutable."""


class Message(Part, frozen=True):
    """A message: its kind is the snake-case name on the wire."""

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[Message]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.kind = "".join(f"_{c.lower()}" if c.isupper() else c for c in cls.__name__).lstrip("_")
        Message.kinds[cls.kind] = cls


# --- parts -----------------------------------------------------------------------------------------------


class WeightsAddress(Part, frozen=True):
    """Where weights of an era are served: `address` "host:port" of the rendezvous, `token` its secret."""

    address: Name
    token: Name
    era: Count


class Assignment(Part, frozen=True):
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


class EvalQuestion(Part, frozen=True):
    """A held-out question of the set `set`."""

    set: Name
    uid: Name
    question: dict[str, Any]


class EvalJob(Part, frozen=True):
    """An evaluation to be answered by one actor at one version, `requested` or later."""

    job: Count
    requested: Count
    questions: list[EvalQuestion]
    samples: Count
    temperature: Temperature
    max_tokens: Annotated[int, Meta(ge=1)]


class Scored(Part, frozen=True):
    """A scored response: `tokens` generated, in tokens."""

    verdict: Verdict
    reward: Number
    tokens: Count
    text: Text | None = None


class EvalRow(Part, frozen=True):
    """Answers to one held-out question: one greedy, and the sampled ones."""

    set: Name
    uid: Name
    greedy: Scored
    sampled: list[Scored]


class ResponseHeader(Part, frozen=True):
    """One response: `tokens` sampled, `versions` run-length pairs (version, tokens) that add up to it."""

    tokens: Tokens
    reward: Number
    verdict: Verdict
    finish: Literal["stop", "length"]
    versions: list[VersionRun]


class GroupHeader(Part, frozen=True):
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


# --- requests of every peer -------------------------------------------------------------------------------


class Hello(Message, frozen=True):
    """First message of a peer; `run` refuses to join any other run, `tokenizer` is a digest that must agree.

    `sampling` is an actor's `common.recipe.digest.sampling_digest`: where the run was resumed with another recipe, the
    answer is `changed`, and a fresh process joins with that one.
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
    sampling: Name | None = None
    process: Annotated[str, Meta(max_length=32)] = ""


class Heartbeat(Message, frozen=True):
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


class Goodbye(Message, frozen=True):
    """The peer leaves; its leases go back."""

    reason: Text


class Stop(Message, frozen=True):
    """End the run in order: actors and learner are told to stop, the learner writes a checkpoint."""

    reason: Text


class StatusQuery(Message, frozen=True):
    """What is going on; `groups` lists the buffer too."""

    groups: bool = False


class Stacks(Message, frozen=True):
    """Where every thread of the peer's processes stands: the answer to `Pulse.dump_stacks` = `request`."""

    request: Name
    text: Annotated[str, Meta(max_length=MAX_STACKS_CHARS)]


class Drain(Message, frozen=True):
    """These actors shall finish what they have, lease nothing more, and leave."""

    actors: Annotated[list[Name], Meta(max_length=5000)]
    reason: Text


class GroupQuery(Message, frozen=True):
    """One group whole: header, question and payload."""

    group: GroupId


# --- requests of an actor ---------------------------------------------------------------------------------


class Lease(Message, frozen=True):
    """Ask for up to `capacity` groups; the broker answers at once or holds the request for `wait_s`."""

    capacity: Count
    version: Count
    era: Count
    wait_s: Seconds


class Publish(Message, frozen=True):
    """A scored group, with its payload."""

    header: GroupHeader


class Release(Message, frozen=True):
    """Hand back leases that will not be answered.

    `cause` is for the broker: `leaving` is not held against a question, `failed` counts towards
    `broker.max_attempts`, `unanswerable` (no actor could, such as a prompt that is too long) gives it up at once.
    `evaluation` is a job that will not be answered either.
    """

    groups: list[GroupId]
    reason: Text
    cause: Cause = "failed"
    evaluation: Count | None = None


class EvalResult(Message, frozen=True):
    """Answers to an evaluation job, all sampled at `version`."""

    job: Count
    version: Count
    era: Count
    rows: list[EvalRow]
    seconds: Seconds


# --- requests of the learner ------------------------------------------------------------------------------


class Rewind(Message, frozen=True):
    """The learner starts (or starts again) from the checkpoint of `step`; opens a new era.

    A checkpoint ahead of the commits proves that the steps before it, which were taken, are trained.
    """

    step: Count
    version: Count


class Serve(Message, frozen=True):
    """Weights of this era are served here."""

    weights: WeightsAddress


class Take(Message, frozen=True):
    """Ask for the groups of `step`; held for at most `wait_s`. The same step again gets the same groups."""

    step: Count
    wait_s: Seconds


class Fetch(Message, frozen=True):
    """Ask for payloads of taken groups: three buffers per group, in order."""

    groups: list[GroupId]


class Commit(Message, frozen=True):
    """Step done: its groups are consumed and `version` (= step + 1) exists; `metrics` of the step."""

    step: Count
    version: Count
    metrics: dict[str, Number]
    samples: list[dict[str, Any]] = []


class Pin(Message, frozen=True):
    """A checkpoint of `step` (the state before step `step`) is safe at `path`: the history before it is final."""

    step: Count
    path: Text


# --- replies ----------------------------------------------------------------------------------------------


class Refused(Message, frozen=True):
    """The request was not carried out; `code` is for programs, `reason` for people.

    A `not_now` may be another answer within `passes_s`: to keep asking for so long is worth while.
    """

    code: Literal[
        "malformed",
        "unknown_peer",
        "incompatible",
        "changed",
        "not_now",
        "stale",
        "conflict",
        "shut_out",
        "full",
        "internal",
    ]
    reason: Text
    passes_s: Seconds = 0.0


class Ack(Message, frozen=True):
    """Done. For a group: accepted, duplicate, filtered (zero variance), or expired (too stale; re-leased)."""

    status: Literal["ok", "accepted", "duplicate", "filtered", "expired"] = "ok"
    reason: Text | None = None


class Welcome(Message, frozen=True):
    """The peer is in: the whole recipe, where the run stands, where weights come from.

    Steps from `step` up to `next_step` (excluded) are taken and not committed: the checkpoint of a learner that has
    trained them may be of `next_step`.
    """

    run: Name
    recipe: dict[str, Any]
    folder: Text
    step: Count
    next_step: Count
    version: Count
    era: Count
    weights: WeightsAddress | None
    heartbeat_s: Seconds
    resumed: bool


class Pulse(Message, frozen=True):
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


class Grant(Message, frozen=True):
    """Leased groups, possibly none (`reason` then says what the actor waits for), and an evaluation."""

    groups: list[Assignment]
    evaluation: EvalJob | None = None
    reason: Text | None = None


class Batch(Message, frozen=True):
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


class Payloads(Message, frozen=True):
    """Three buffers for each of `groups`, in order."""

    groups: list[GroupId]


class Rewound(Message, frozen=True):
    """The history now ends before `step`; the learner serves weights under `era`."""

    step: Count
    era: Count
    reopened: Count
    dropped: Count


class Status(Message, frozen=True):
    """A snapshot of the run for people and launchers; the keys are documented in docs/operating.md."""

    status: dict[str, Any]


class GroupView(Message, frozen=True):
    """One group for inspection; the payload is the group's three buffers where the broker still has them."""

    state: Name
    question: dict[str, Any]
    header: GroupHeader | None
