"""The schema of a recipe: every setting of a run, with unit, default and source.

Invariant: the defaults are those of the paper's Table 6 ("Understanding R1-Zero-Like Training",
arXiv 2503.20783, appendix G) wherever it names one; a model instance is immutable and free of contradictions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from common.recipe.presets import equal_rewards_are_neutral, has_group_baseline

MOST = 10**9  # more than any setting can mean, and less than what messages, timers and random generators take
PositiveInt = Annotated[int, Field(gt=0, le=MOST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MOST)]
PositiveFloat = Annotated[float, Field(gt=0, le=MOST, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=MOST, allow_inf_nan=False)]
Port = Annotated[int, Field(ge=0, le=65535)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Discount = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A table of a recipe: unknown keys are refused, values cannot be changed after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class RunSection(Section):
    """What the run is called, where it lives, how long it goes."""

    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,99}$",
        description="Folder of the run below `root`; default: the recipe's file name.",
    )
    recipe: str | None = Field(
        None, description="Recipe that the run was started from; filled in when it is read."
    )
    root: Path = Field(Path("runs"), description="Folder that holds the run folders.")
    seed: NonNegativeInt = Field(
        42, description="Seeds the question order, the learner and the engines' samplers."
    )
    steps: PositiveInt = Field(
        300,
        description="Policy iteration steps: one weight push after each (paper section 3.2 shows about 290).",
    )


class ModelSection(Section):
    """The policy."""

    path: str = Field(description="Hugging Face folder or hub id of the base model.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="Weights in the engine and compute type of the learner."
    )
    max_context: PositiveInt = Field(
        4096, description="Tokens of prompt + response that the engine reserves for (paper: 4096)."
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")


class LoraSection(Section):
    """Low-rank adapters (peft) in place of full training."""

    rank: PositiveInt = Field(16, description="Rank of the adapters.")
    alpha: PositiveFloat = Field(32.0, description="Scale; the update is alpha / rank * B A.")
    target_modules: tuple[str, ...] | Literal["all-linear"] = Field(
        "all-linear", description="Modules that get an adapter."
    )
    push: Literal["merged", "adapter"] = Field(
        "merged", description="Push merged weights, or adapters that vLLM loads as a LoRA."
    )


class DataSection(Section):
    """The questions, how they are put to the model, and what a right answer earns."""

    train: str = Field(description="A named question set, a hub id, or a local JSONL / parquet / arrow path.")
    data_dir: Path | None = Field(None, description="Folder searched for named question sets before the hub.")
    split: str = Field("train", description="Split of a hub data set.")
    problem_field: str | None = Field(
        None, description="Field with the question; default: `problem`, or what a named set says."
    )
    answer_field: str | None = Field(
        None, description="Field with the gold answer; default: `answer`, or what a named set says."
    )
    levels: tuple[int, ...] | None = Field(None, description="Keep only questions of these levels.")
    limit: PositiveInt | None = Field(None, description="Keep only the first n questions.")
    max_epochs: PositiveInt = Field(20, description="Passes over the set at most (paper: 20, a cap only).")
    template: str = Field("qwen_math", description="Name of a template, or a text that contains {question}.")
    max_prompt_tokens: PositiveInt = Field(
        1024, description="Questions with longer prompts are given up when an actor meets them (paper: 1024)."
    )
    reward: str = Field("math", description="`math` (the verifier), or `package.module:function`.")


class VerifierSection(Section):
    """How responses are scored."""

    level: Literal["fast", "full"] = Field(
        "fast", description="`full` also asks Math-Verify (paper section 4)."
    )
    deadline_s: PositiveFloat = Field(
        2.0, description="Seconds per answer; past it the worker is killed and the verdict is `unverified`."
    )
    workers: PositiveInt = Field(1, description="Processes per actor.")
    allow_tag_whitespace: bool = Field(
        False, description="Accept white space other than one space between </think> and <answer>."
    )


class RolloutSection(Section):
    """Sampling."""

    group_size: PositiveInt = Field(8, description="G: responses per question (Table 6: 8).")
    temperature: PositiveFloat = Field(1.0, description="Sampling temperature (Table 6: 1.0).")
    top_p: float = Field(
        1.0,
        description="Must be 1: recorded log-probabilities must be those of the sampling distribution (I6).",
    )
    top_k: int = Field(-1, description="Must be -1 (off), for the same reason.")
    max_tokens: PositiveInt = Field(
        3000, description="Generation budget per response, in tokens (Table 6: 3000)."
    )

    @model_validator(mode="after")
    def _sampling_is_exact(self) -> RolloutSection:
        if self.top_p != 1.0:
            raise ValueError(
                "top_p must be 1.0: with nucleus sampling the recorded log-probabilities are not those of the policy"
            )
        if self.top_k != -1:
            raise ValueError(
                "top_k must be -1 (off): with top-k sampling the recorded log-probabilities are not those of the policy"
            )
        return self


class BatchSection(Section):
    """What one policy iteration step consumes."""

    questions_per_step: PositiveInt = Field(
        128, description="Groups per step (paper section 3.3: 128, so 1024 responses)."
    )
    optimizer_steps: PositiveInt = Field(
        8,
        description="Optimizer steps per step, over a random permutation of its responses (paper: 8 of 128).",
    )
    max_staleness: NonNegativeInt = Field(
        1, description="Versions that a trained token may lag behind; 0 is synchronous training (I1)."
    )
    zero_variance: Literal["count", "train", "refill"] = Field(
        "count",
        description="What to do with groups whose rewards are all equal. `count`: keep them in N but do not send them (sent anyway if the objective needs them); `train`: send them; `refill`: replace them (dynamic sampling).",
    )
    truncated: Literal["zero", "mask"] = Field(
        "zero",
        description="Responses cut at the budget: reward 0 and trained on (paper), or left out of the loss.",
    )


class AlgorithmSection(Section):
    """The objective: a preset, and settings that replace parts of it (docs/algorithms.md)."""

    preset: Literal[
        "dr_grpo",
        "grpo",
        "wo_len",
        "wo_std",
        "rloo",
        "ppo",
        "reinforce",
        "dr_grpo_dual_clip",
        "dr_grpo_tis",
        "dr_grpo_icepop",
        "dr_grpo_sequence_mask",
        "dr_grpo_geometric_mask",
        "dr_grpo_m2po",
        "dr_grpo_cispo",
        "dr_grpo_gspo",
    ] = Field("dr_grpo", description="Usual combination of the settings below.")
    advantage: Literal["dr_grpo", "grpo", "rloo", "gae", "none"] | None = Field(
        None, description="Replaces the preset's advantage."
    )
    loss: Literal["ppo_clip", "cispo", "gspo", "reinforce"] | None = Field(
        None, description="Replaces the preset's loss."
    )
    anchor: Literal["behavior", "proximal"] | None = Field(
        None,
        description="Replaces the preset's anchor: ratio against the behaviour policy, or against the learner's policy at the start of the step.",
    )
    correction: Literal["none", "tis", "icepop", "sequence_mask", "geometric_mask", "m2po"] | None = Field(
        None, description="Replaces the preset's correction for staleness and engine mismatch."
    )
    aggregation: Literal["constant", "response_mean", "token_mean"] | None = Field(
        None, description="Replaces the preset's aggregation."
    )
    normaliser: PositiveFloat | None = Field(
        None,
        description="L of the constant aggregation, in tokens; default: rollout.max_tokens (paper's Listing 1).",
    )
    clip_low: PositiveFloat | None = Field(
        None, description="Lower clip ε; default of the loss (ppo_clip 0.2, Table 6)."
    )
    clip_high: PositiveFloat | None = Field(
        None, description="Upper clip ε; default of the loss (ppo_clip 0.2, Table 6)."
    )
    dual_clip: PositiveFloat | None = Field(
        None, description="Bound on the ratio where the advantage is negative (usual: 3); off by default."
    )
    correction_cap: PositiveFloat | None = Field(
        None, description="Upper bound of the correction; default of the correction (tis 2, icepop 5)."
    )
    correction_floor: NonNegativeFloat | None = Field(
        None, description="Lower bound of the correction; default of the correction (icepop 0.5)."
    )
    second_moment: PositiveFloat = Field(0.04, description="τ of the correction m2po (its paper: 0.04).")
    kl_beta: NonNegativeFloat = Field(
        0.0,
        description="Weight of the KL to the reference model in the loss (Table 6: 0; then no reference model is loaded).",
    )
    kl_estimator: Literal["k2", "k3"] = Field(
        "k3", description="Estimator of that KL (GRPO: k3; the gradient of k1 is 0 in the mean)."
    )
    kl_in_reward: NonNegativeFloat = Field(
        0.0, description="Weight of the KL penalty in the reward (Table 6: 0)."
    )
    gamma: Discount = Field(1.0, description="Discount of GAE (paper: 1).")
    lam: Discount = Field(1.0, description="λ of GAE (paper: 1).")
    value_clip: PositiveFloat = Field(0.2, description="Value clip of PPO (paper's code: 0.2).")
    value_coefficient: PositiveFloat = Field(1.0, description="Weight of the value loss (paper's code: 1).")
    epochs: PositiveInt = Field(1, description="Passes over the responses of a step (Table 6: 1).")


class LearnerSection(Section):
    """Optimizer, precision and memory of the DeepSpeed learner."""

    ranks: PositiveInt = Field(1, description="Data-parallel processes.")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        2, description="DeepSpeed ZeRO stage (paper's scripts: 2, Llama 3B: 3)."
    )
    lr: PositiveFloat = Field(1e-6, description="Learning rate (Table 6: 1e-6).")
    critic_lr: PositiveFloat = Field(
        9e-6, description="Learning rate of the value head's model (paper's code: 9e-6)."
    )
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="Learning-rate schedule (Table 6: constant)."
    )
    warmup_steps: NonNegativeInt = Field(0, description="Optimizer steps of linear warm-up.")
    betas: tuple[Decay, Decay] = Field((0.9, 0.95), description="AdamW β (Table 6).")
    eps: PositiveFloat = Field(1e-8, description="AdamW ε.")
    weight_decay: NonNegativeFloat = Field(0.0, description="AdamW weight decay (Table 6: 0).")
    max_grad_norm: PositiveFloat = Field(1.0, description="Gradient-norm clip (Table 6: 1.0).")
    micro_batch_tokens: PositiveInt = Field(16384, description="Tokens per packed micro-batch.")
    logprob_chunk_tokens: PositiveInt = Field(1024, description="Tokens whose logits exist at one time.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass.")
    checkpoint_every: PositiveInt = Field(50, description="Steps between checkpoints.")
    keep_last: PositiveInt = Field(2, description="Checkpoints kept.")
    keep_best: bool = Field(True, description="Also keep the checkpoint with the best held-out accuracy.")
    max_mismatch: PositiveFloat | None = Field(
        None,
        description="Stop when the mean |log-prob difference| between engine and learner exceeds this (I6); default: 0.02 in float32, 0.1 in bfloat16.",
    )
    collective_timeout_s: PositiveFloat = Field(
        600.0, description="Seconds that a rank waits for the others."
    )
    master_port: Port = Field(0, description="Port of the ranks' rendezvous; 0 picks a free one.")


class BrokerSection(Section):
    """Ledger, buffer and sockets."""

    bind: str = Field("127.0.0.1", description="Address to bind; anything but loopback needs keys (I8).")
    port: Port = Field(0, description="TCP port; 0 picks a free one, written to the run folder.")
    metrics_port: Port = Field(0, description="Port of the Prometheus page on loopback; 0 picks a free one.")
    keys: Path | None = Field(None, description="Folder of CURVE keys (`slipstream keys init`).")
    durability: Literal["journal", "memory"] = Field(
        "journal", description="`journal` survives a crash of the broker; `memory` does not."
    )
    lease_s: PositiveFloat = Field(
        600.0, description="Seconds an actor has for a group without a sign of life."
    )
    heartbeat_s: PositiveFloat = Field(2.0, description="Seconds between heartbeats.")
    dead_after_s: PositiveFloat = Field(
        30.0, description="Seconds without a heartbeat after which a peer is dead."
    )
    max_message_mb: PositiveInt = Field(64, description="Largest message accepted, in MiB.")
    max_attempts: PositiveInt = Field(5, description="Lost leases per question before it is abandoned.")
    lease_max_s: PositiveFloat = Field(
        3600.0, description="Seconds an actor may hold a group at all, signs of life or not (I4)."
    )
    max_bad_messages: PositiveInt = Field(
        100,
        description="Malformed messages after which a peer is shut out (I8); half are forgiven each minute.",
    )
    final_eval_s: PositiveFloat = Field(
        600.0, description="Seconds after the last step that the run waits for its last evaluation."
    )
    fsync: bool = Field(
        False,
        description="Also survive a power cut: the journal waits for the disk. A killed process loses nothing either way.",
    )
    record: bool = Field(
        False, description="Keep the payloads of trained groups for `slipstream learner --replay`."
    )
    no_progress_s: PositiveFloat = Field(
        600.0, description="Seconds without progress after which the watchdog writes every process's stacks."
    )


class ActorSection(Section):
    """vLLM engines."""

    count: PositiveInt = Field(1, description="Actors that the launcher starts; more may join at any time.")
    tensor_parallel: PositiveInt = Field(1, description="GPUs (or CPU ranks) per engine.")
    max_sequences: PositiveInt = Field(256, description="Sequences decoded at one time.")
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="Share of a GPU's memory that the engine takes."
    )
    kv_cache_mb: PositiveInt | None = Field(
        None, description="KV cache in MiB; default: what vLLM finds (GPU), 1024 (CPU)."
    )
    enforce_eager: bool = Field(
        False, description="No graph capture or compilation: slower decoding, faster start."
    )
    clear_cache: bool = Field(
        True,
        description="Recompute the KV cache after a weight swap; false keeps it (old keys and values, new weights).",
    )
    prefix_caching: bool = Field(True, description="Share the prompt's KV cache among the G samples.")
    threads: PositiveInt | None = Field(
        None, description="OMP threads on CPU; default: the cores that the launcher gives."
    )


class WeightsSection(Section):
    """How new weights reach running engines."""

    route: Literal["auto", "nccl", "gloo", "ipc", "disk"] = Field(
        "auto",
        description="`auto`: nccl on GPU (gloo with `actor.tensor_parallel`), ipc on one shared GPU, gloo on CPU.",
    )
    bind: str = Field("127.0.0.1", description="Address that the learner serves weights on.")
    port: Port = Field(0, description="Port of the weights rendezvous; 0 picks a free one.")
    bucket_mb: PositiveInt = Field(256, description="Size of a packed bucket in MiB.")
    snapshots: Literal["device", "host"] = Field(
        "device",
        description="Where the learner keeps the (at most two) versions that it sends over nccl: `host` frees twice "
        "the model's size on rank 0's GPU and costs a copy over the bus, once per step and once per link.",
    )
    deadline_s: PositiveFloat = Field(30.0, description="Seconds that any wait of a link may last.")
    degree: PositiveInt = Field(
        4, description="Links that the learner serves itself; further actors are fed by actors."
    )
    checksum_every: PositiveInt = Field(
        50, description="Compare every parameter's checksum on the first push and each n-th."
    )


class EvalSection(Section):
    """Held-out evaluation while training goes on."""

    every: PositiveInt = Field(16, description="Versions between evaluations (paper: 16).")
    sets: tuple[str, ...] = Field(
        (), description="Question sets, named or local as in `data.train`; empty: no evaluation."
    )
    limit: PositiveInt | None = Field(None, description="Questions per set at most.")
    samples: NonNegativeInt = Field(
        1, description="Sampled responses per question at `temperature`, besides the greedy one."
    )
    temperature: PositiveFloat = Field(1.0, description="Temperature of the sampled responses.")
    max_tokens: PositiveInt | None = Field(None, description="Budget in tokens; default: rollout.max_tokens.")


class TrackingSection(Section):
    """MLflow."""

    enabled: bool = Field(
        True, description="Send metrics to MLflow; metrics.jsonl in the run folder is written either way."
    )
    uri: str | None = Field(
        None,
        description="MLflow server; default: $MLFLOW_TRACKING_URI, else an SQLite store beside the run folders.",
    )
    experiment: str = Field("slipstream", description="MLflow experiment.")
    samples_every: PositiveInt = Field(10, description="Steps between tables of sample responses.")


class LaunchSection(Section):
    """How the one-machine launcher shares out cores and GPUs."""

    device: Literal["auto", "cpu", "gpu"] = Field("auto", description="`auto`: gpu where NVML finds one.")
    shared_gpu: bool = Field(False, description="Learner and actors share one GPU.")
    learner_cores: PositiveInt | None = Field(
        None, description="Cores per learner rank on CPU; default: shared out evenly."
    )
    actor_cores: PositiveInt | None = Field(
        None, description="Cores per actor on CPU; default: shared out evenly."
    )
    restarts: NonNegativeInt = Field(
        5, description="Restarts of one worker before it, or the run, is given up."
    )


class Recipe(Section):
    """A complete run."""

    run: RunSection = RunSection()
    model: ModelSection
    data: DataSection
    verifier: VerifierSection = VerifierSection()
    rollout: RolloutSection = RolloutSection()
    batch: BatchSection = BatchSection()
    algorithm: AlgorithmSection = AlgorithmSection()
    lora: LoraSection | None = None
    learner: LearnerSection = LearnerSection()
    broker: BrokerSection = BrokerSection()
    actor: ActorSection = ActorSection()
    weights: WeightsSection = WeightsSection()
    eval: EvalSection = EvalSection()
    tracking: TrackingSection = TrackingSection()
    launch: LaunchSection = LaunchSection()

    @model_validator(mode="after")
    def _no_contradictions(self) -> Recipe:
        for check in (_group_baseline, _context, _batch_arithmetic, _value_head, _refill, _heartbeats):
            check(self)
        return self

    @property
    def folder(self) -> Path:
        """The run folder, `root/name`."""
        return self.run.root / (self.run.name or "run")

    @property
    def responses_per_step(self) -> int:
        """N of a step: responses scheduled, whatever is filtered later."""
        return self.batch.questions_per_step * self.rollout.group_size

    @property
    def responses_per_optimizer_step(self) -> int:
        """N of the constant aggregation: responses scheduled per optimizer step."""
        return self.responses_per_step // self.batch.optimizer_steps

    @property
    def sequences_leased(self) -> int:
        """Sequences that an actor keeps in its engine: an eighth more than it decodes, and a group at least, so that
        a free slot is filled at once."""
        slots = self.actor.max_sequences
        return slots + max(self.rollout.group_size, slots // 8)

    @property
    def normaliser(self) -> float:
        """L of the constant aggregation, in tokens (Listing 1: the generation budget)."""
        return self.algorithm.normaliser or float(self.rollout.max_tokens)

    @property
    def effective_zero_stage(self) -> int:
        """The ZeRO stage that runs: DeepSpeed's stage 0 cannot accumulate bfloat16 gradients in float32."""
        stage = self.learner.zero_stage
        return max(stage, 1) if self.model.dtype == "bfloat16" else stage

    @property
    def equal_rewards(self) -> Literal["count", "train", "refill"]:
        """What becomes of groups of equal rewards: `batch.zero_variance`, but never counted where that would
        change the gradient."""
        mode = self.batch.zero_variance
        return "train" if mode == "count" and not equal_rewards_are_neutral(self.algorithm) else mode

    @property
    def max_mismatch(self) -> float:
        """Limit of the engine / learner log-probability mismatch (I6), in nats per token."""
        return self.learner.max_mismatch or (0.02 if self.model.dtype == "float32" else 0.1)


def _group_baseline(recipe: Recipe) -> None:
    if recipe.rollout.group_size == 1 and has_group_baseline(recipe.algorithm):
        name = recipe.algorithm.advantage or recipe.algorithm.preset
        raise ValueError(
            f"rollout.group_size = 1 leaves algorithm '{name}' without a baseline: "
            'take at least 2, or algorithm.preset = "reinforce" or "ppo"'
        )


def _context(recipe: Recipe) -> None:
    if recipe.rollout.max_tokens >= recipe.model.max_context:
        raise ValueError(
            f"rollout.max_tokens = {recipe.rollout.max_tokens} leaves no room for a prompt within "
            f"model.max_context = {recipe.model.max_context}"
        )


def _batch_arithmetic(recipe: Recipe) -> None:
    if recipe.responses_per_step % recipe.batch.optimizer_steps:
        raise ValueError(
            f"batch.optimizer_steps = {recipe.batch.optimizer_steps} does not divide the "
            f"{recipe.responses_per_step} responses of a step (batch.questions_per_step x rollout.group_size)"
        )


def _value_head(recipe: Recipe) -> None:
    advantage = recipe.algorithm.advantage
    if recipe.algorithm.preset == "ppo" and advantage not in (None, "gae"):
        raise ValueError(
            f"algorithm.advantage = '{advantage}' contradicts algorithm.preset = 'ppo', which needs 'gae'"
        )


def _refill(recipe: Recipe) -> None:
    if recipe.batch.zero_variance != "refill":
        return
    if not has_group_baseline(recipe.algorithm):
        name = recipe.algorithm.advantage or recipe.algorithm.preset
        raise ValueError(
            f"batch.zero_variance = 'refill' contradicts algorithm '{name}', which has no group baseline and "
            "learns from groups of equal rewards too: set 'train'"
        )


def _heartbeats(recipe: Recipe) -> None:
    if recipe.broker.lease_s < 2 * recipe.broker.heartbeat_s:
        raise ValueError("broker.lease_s must be at least twice broker.heartbeat_s")
    if recipe.broker.dead_after_s < 2 * recipe.broker.heartbeat_s:
        raise ValueError("broker.dead_after_s must be at least twice broker.heartbeat_s")
