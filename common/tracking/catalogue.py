"""Every metric that a run may emit: its name, its unit, and what it is a mean or a share of.

Invariant: a point's metric is called `GROUP/NAME` in MLflow, where GROUP is the kind of its record in
`metrics.jsonl` and NAME its key there; a run emits no name that `entry_of` does not know. docs/metrics.md is
written from this table (`python -m deploy.metrics_reference`), and the tests hold both to it.

MLflow draws one section per part before the *last* slash, hence one slash per name; the exceptions want a section
of their own: `eval/SET/...`, `learner/by_staleness/...`, and `system/PEER/...`, which MLflow shows on its tab
"System metrics". Names use what MLflow allows: letters, digits and `_ - . space : /`.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

GROUPS = {
    "actor": "What the actors sampled and how they are doing. Logged by the broker with each step. The rollout "
    "metrics are over **all** groups published since the step before, filtered and expired ones included.",
    "broker": "What the broker holds between actors and learner; counts are as of the step.",
    "learner": "What the learner trained on and how. Verdict shares and lengths are over the responses **sent to "
    "the learner**: groups whose rewards are all equal are filtered before that (`batch.zero_variance`), so these "
    "curves miss what the policy always or never solves. Use the `actor` group for accuracy and length curves.",
    "eval": "Held-out evaluations, at the version that answered. All sets together, and per set as "
    "`eval/SET/NAME`.",
    "system": 'What each process and its GPUs use, as of its last heartbeat, on MLflow\'s tab "System metrics". '
    "Of at most 32 peers; `actor/` has the figures over all actors.",
}
BUCKETS = ("0", "1", "2", "3-4", "5-8", "9-up")  # of staleness, in versions
_FIELD = re.compile(r"\\\{(\w+)\\\}")
_PLACES = {
    "bucket": "|".join(BUCKETS),
    "lag": r"\d+",
    "gpu": r"\d+",
    "k": r"\d+",
    "set": r"[\w.\-]+",
    "peer": r"[\w.\-]+",
}


class Entry(NamedTuple):
    """A metric: `name` may hold {bucket}, {lag}, {gpu}, {k}, {set} or {peer}; an empty `unit` is a pure number."""

    group: str
    name: str
    unit: str
    what: str

    @property
    def full_name(self) -> str:
        """The name in MLflow."""
        return f"{self.group}/{self.name}"


ACTOR = (
    ("groups", "groups", "published since the step before, duplicates not counted again"),
    ("responses", "responses", "of these groups"),
    ("reward", "", "mean reward of these responses"),
    ("accuracy", "share", "correct responses / responses"),
    ("format_share", "share", "responses with an answer in the form that the template asks for (correct or wrong) / responses"),
    ("truncated", "share", "responses that hit the token budget / responses"),
    ("unverified", "share", "responses that the verifier gave up on / responses"),
    ("length", "tokens", "mean length of a response"),
    ("length_correct", "tokens", "mean length of a correct response"),
    ("length_incorrect", "tokens", "mean length of any other response"),
    ("length_max", "tokens", "longest response"),
    ("groups_all_correct", "share", "groups whose every response is correct / groups"),
    ("groups_all_wrong", "share", "groups without a correct response / groups"),
    ("groups_equal_reward", "share", "groups whose rewards are all equal, which have no gradient / groups"),
    ("staleness", "versions", "mean of (newest version − version of the oldest token of the group) at publication"),
    ("count", "actors", "actors in the run"),
    ("waiting", "actors", "of these, how many wait for somebody"),
    ("tokens_per_s", "tokens/s", "response tokens published per second over the last minute, all actors"),
    ("versions_behind", "versions", "mean over actors of newest version − version in the engine"),
    ("versions_behind_max", "versions", "the same, of the actor that is furthest behind"),
    ("sequences", "sequences", "in all engines, running or queued"),
    ("kv_use", "share", "of the KV cache in use, mean over actors"),
    ("verifier_queue", "responses", "waiting for the verifier, all actors"),
    ("weights_staged_s", "s", "receiving and staging the last push beside the running engine; slowest actor"),
    ("weights_stopped_ms", "ms", "that an engine stood still for the last swap; slowest actor"),
    ("weights_probe_mean", "nats", "mean |log π of the engine − log π of the learner| over the probe of the engine's newest version (I6); worst actor"),
    ("weights_probe_max", "nats", "largest such difference of a token; worst actor"),
    ("cpu_cores", "cores", "busy, sum over actors"),
    ("rss_mb", "MiB", "resident memory, sum over actors"),
    ("gpu_use", "share", "of the time a kernel ran (NVML), mean over the actors' GPUs"),
    ("gpu_memory_share", "share", "of GPU memory used (NVML), mean over the actors' GPUs"),
)  # fmt: skip

BROKER = (
    ("filtered_share", "share", "groups of the step that were filtered for equal rewards / groups of the step"),
    ("staleness_max", "versions", "step − version, of the oldest token of the step"),
    ("staleness_mean", "versions", "step − version, mean over all response tokens trained on so far"),
    ("in_flight", "leases", "given out and not answered"),
    ("buffered", "groups", "published and not taken by the learner"),
    ("expired", "leases", "so far: answered too late to be trained on"),
    ("abandoned", "leases", "so far: lost with their actor, or handed back"),
    ("ledger_sum_ok", "0 or 1", "whether leased = in flight + buffered + taken + consumed + filtered + expired + abandoned"),
    ("length_sampled", "tokens", "mean length of all responses published so far"),
    ("length_trained", "tokens", "mean length of all responses trained on so far; well below `length_sampled` means that long responses are selected against"),
    ("length_sampled_p90", "tokens", "90th percentile of the same (upper edge of a half-octave bucket)"),
    ("length_trained_p90", "tokens", "90th percentile of the same (upper edge of a half-octave bucket)"),
    ("store_mb", "MiB", "payloads held in memory"),
    ("in_mb", "MiB", "payload published so far"),
    ("out_mb", "MiB", "payload fetched so far"),
    ("bad_messages", "messages", "malformed ones so far"),
)  # fmt: skip

# Means over the response tokens that went through the loss, epochs counted (`tokens`); also per staleness.
TOKEN_BLOCK = (
    ("tokens", "tokens", "response tokens that went through the loss, epochs counted: T below"),
    ("loss", "", "sum of the weighted token losses"),
    ("ratio_mean", "", "importance ratio ρ = π/μ, mean over T"),
    ("ratio_max", "", "largest ρ"),
    ("ratio_ess", "share", "effective sample size (Σρ)² / (T Σρ²)"),
    ("clip_low_mean", "share", "tokens whose gradient the lower clip removed / T"),
    ("clip_high_mean", "share", "tokens whose gradient the upper clip removed / T"),
    ("kl_behaviour_mean", "nats/token", "k3 estimate of KL(μ ‖ π): mean of ρ − 1 − log ρ"),
    ("entropy_mean", "nats/token", "entropy of the policy"),
    ("correction_mean", "", "weight of the staleness correction (only with `algorithm.correction`)"),
    ("dropped_mean", "share", "tokens whose correction weight is 0 / T (only with `algorithm.correction`)"),
    ("kl_reference_mean", "nats/token", "KL to the reference model (only with one)"),
)  # fmt: skip

LEARNER = (
    ("reward", "", "mean reward of all responses of the step, filtered groups included"),
    ("responses", "responses", "scheduled for the step, filtered groups included: N"),
    ("filtered_share", "share", "filtered groups / groups of the step"),
    ("verdict_correct", "share", "correct responses / responses sent to the learner"),
    ("verdict_wrong", "share", "wrong ones, over the same"),
    ("verdict_unformatted", "share", "those without an answer in the form asked for, over the same"),
    ("verdict_truncated", "share", "those cut off at the token budget (reward 0, whatever they say), over the same"),
    ("verdict_unverified", "share", "those that the verifier gave up on, over the same"),
    ("length", "tokens", "mean length of a response sent to the learner"),
    ("length_correct", "tokens", "of these, of the correct ones"),
    ("length_incorrect", "tokens", "of these, of all others"),
    ("length_max", "tokens", "longest response sent to the learner"),
    ("truncated_share", "share", "responses that hit the token budget, with an answer or without / responses sent"),
    *TOKEN_BLOCK,
    ("staleness_mean", "versions", "step − version of the token, mean over the response tokens of the step"),
    ("staleness_max", "versions", "the same, of the oldest token"),
    ("mismatch_tokens", "tokens", "sampled by the very weights that train: those compared below; asynchronous training rarely has any, hence `actor/weights_probe_mean`"),
    ("mismatch_mean", "nats/token", "mean |log π(learner) − log μ(engine)| at equal weights (I6)"),
    ("mismatch_max", "nats", "the largest of these"),
    ("mismatch_k3", "nats/token", "k3 estimate of KL(μ ‖ π) at equal weights"),
    ("mismatch_measured_share", "share", "steps so far that had tokens to compare / steps"),
    ("grad_norm", "", "mean norm of the gradient before clipping, over the updates of the step"),
    ("grad_norm_max", "", "largest of these"),
    ("skipped_updates", "updates", "not applied because the gradient was not finite"),
    ("lr", "", "learning rate of the last update"),
    ("invalid_responses", "responses", "refused by the learner (ids outside the vocabulary, log-probabilities not finite)"),
    ("seconds_waiting", "s", "of this step spent waiting for groups"),
    ("seconds_training", "s", "forward, backward, update"),
    ("seconds_publishing", "s", "taking the snapshot for the weight push"),
    ("seconds_checkpointing", "s", "writing checkpoints and exports"),
    ("idle_share", "share", "seconds_waiting / sum of the four"),
    ("tokens_per_s", "tokens/s", "prompt and response tokens trained / seconds_training, all ranks"),
    ("checkpoint_failures", "checkpoints", "that a full disk prevented since the last that was written"),
    ("push_version", "versions", "newest version offered to the actors"),
    ("push_pushes", "pushes", "so far: versions sent"),
    ("push_links", "links", "actors connected for weights"),
    ("push_snapshots_held", "snapshots", "of the weights in memory"),
    ("push_bytes_sent", "bytes", "so far, by the learner"),
    ("push_bytes_relayed", "bytes", "so far, by actors to actors"),
    ("push_send_s", "s", "from the first to the last byte of the last push"),
    ("push_staged_s", "s", "until the slowest actor had staged it"),
    ("push_stopped_ms", "ms", "longest stop of an engine for the swap"),
    ("push_versions_behind", "versions", "of the actor that is furthest behind"),
    ("push_failures", "links", "so far: broken off, for any cause"),
)  # fmt: skip

_STALENESS = (
    *((f"by_staleness/{name}_at_{{bucket}}", unit, f"`{name}` over tokens of this staleness, in versions") for name, unit, _ in TOKEN_BLOCK),
    ("by_staleness/token_share_at_{lag}", "share", "response tokens of the step that are so many versions old / all"),
)  # fmt: skip

_EVAL_BLOCK = (
    ("questions", "questions", "answered"),
    ("greedy", "share", "correct greedy answers / questions, each set counted once in the mean over sets"),
    ("greedy_length", "tokens", "mean length of a greedy answer"),
    ("pass1", "share", "correct sampled answers / sampled answers (`eval.samples` each, at `eval.temperature`): pass@1; each set counted once in the mean over sets"),
    ("length", "tokens", "mean length of a sampled answer"),
    ("length_correct", "tokens", "of the correct ones"),
    ("length_incorrect", "tokens", "of all others"),
    ("unformatted", "share", "sampled answers without the form asked for / sampled answers"),
    ("truncated", "share", "sampled answers cut off before a right answer, over the same"),
    ("unverified", "share", "sampled answers that the verifier gave up on, over the same"),
)  # fmt: skip

# `slipstream eval` logs these, one step, per set only.
_OFFLINE_EVAL = (
    ("average", "share", "mean accuracy over sets, each set counted once (`slipstream eval`)"),
    ("{set}/accuracy", "share", "correct answers / answers (`slipstream eval`)"),
    ("{set}/pass_at_{k}", "share", "unbiased estimate of pass@k (`slipstream eval`)"),
    ("{set}/tokens_mean", "tokens", "mean length of an answer (`slipstream eval`)"),
    ("{set}/formatted", "share", "answers in the form asked for (`slipstream eval`)"),
    ("{set}/truncated", "share", "answers cut off at the token budget (`slipstream eval`)"),
    ("{set}/unverified", "share", "answers that the verifier gave up on (`slipstream eval`)"),
)  # fmt: skip

EVAL = (
    *_EVAL_BLOCK,
    ("requested", "versions", "version that the evaluation was asked for at"),
    ("seconds", "s", "from the grant to the last answer"),
    *((f"{{set}}/{name}", unit, f"`{name}` of one set") for name, unit, _ in _EVAL_BLOCK),
    *(row for row in _OFFLINE_EVAL if row[0] not in {f"{{set}}/{name}" for name, _, _ in _EVAL_BLOCK}),
)

SYSTEM = (
    ("{peer}/cpu_cores", "cores", "busy, the process and its children"),
    ("{peer}/rss_mb", "MiB", "resident memory, the process and its children"),
    ("{peer}/gpu{gpu}_use", "share", "of the time a kernel ran (NVML)"),
    ("{peer}/gpu{gpu}_memory_mb", "MiB", "used on that GPU (NVML)"),
    ("{peer}/gpu{gpu}_memory_share", "share", "of its memory (NVML)"),
    ("{peer}/gpu{gpu}_power_w", "W", "drawn (NVML)"),
    ("{peer}/gpu{gpu}_temperature_c", "°C", "of the chip (NVML)"),
)

TABLE = tuple(
    Entry(group, *row)
    for group, rows in (
        ("actor", ACTOR),
        ("broker", BROKER),
        ("learner", (*LEARNER, *_STALENESS)),
        ("eval", EVAL),
        ("system", SYSTEM),
    )
    for row in rows
)


def full_name(kind: str, name: str) -> str:
    """Name in MLflow of a metric in a record of `metrics.jsonl`."""
    return f"{kind}/{name}"


@functools.cache
def _patterns() -> tuple[tuple[re.Pattern[str], Entry], ...]:
    def pattern(name: str) -> re.Pattern[str]:
        return re.compile(_FIELD.sub(lambda field: f"(?:{_PLACES[field[1]]})", re.escape(name)))

    return tuple((pattern(entry.full_name), entry) for entry in TABLE)


@functools.cache
def entry_of(name: str) -> Entry | None:
    """The entry of a full metric name, or None where no run emits it."""
    return next((entry for pattern, entry in _patterns() if pattern.fullmatch(name)), None)


def plain(name: str) -> str:
    """A name of a set or a peer as one part of a metric's name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name)
