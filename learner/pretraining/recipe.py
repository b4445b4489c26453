"""The schema of a pretraining recipe.

Invariant: a recipe that loads is complete and free of contradictions; the corpus, the tokenizer and the model
follow from it and its seed alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from common.recipe.schema import Decay, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section
from common.tasks.minimath import FAMILIES, MAX_LEVEL, SETS
from common.tasks.templates import get_template, template_text

Share = Annotated[float, Field(ge=0, le=1)]


class ModelSection(Section):
    """A Qwen2 model small enough for one core."""

    layers: PositiveInt = Field(3, description="Decoder layers.")
    hidden: PositiveInt = Field(128, description="Width of the residual stream.")
    heads: PositiveInt = Field(4, description="Query heads; hidden / heads is the head size.")
    kv_heads: PositiveInt = Field(2, description="Key and value heads (grouped-query attention).")
    ffn: PositiveInt = Field(384, description="Width of the gated feed-forward layer.")
    context: PositiveInt = Field(1024, description="Longest sequence in tokens (max_position_embeddings).")
    tie_embeddings: bool = Field(True, description="One matrix for input embedding and output head.")

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelSection:
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise ValueError(
                "model.heads must divide model.hidden, and model.kv_heads must divide model.heads"
            )
        if (self.hidden // self.heads) % 2:
            raise ValueError("model.hidden / model.heads must be even (rotary embedding)")
        return self


class TokenizerSection(Section):
    """Byte-level characters, plus whole strings that are one token each."""

    templates: tuple[str, ...] = Field(
        ("qwen_math",),
        description="Templates whose fixed text becomes single tokens, so that prompts are short.",
    )
    strings: tuple[str, ...] = Field(("\\boxed{",), description="Further strings that are one token each.")

    @model_validator(mode="after")
    def _known_names(self) -> TokenizerSection:
        for name in self.templates:
            template_text(name)
        return self


class MixtureItem(Section):
    """One kind of document and its share of the corpus."""

    kind: Literal["qa", "reflection", "exercises", "facts", "drill"] = Field(
        "qa",
        description="qa: question, working, answer. reflection: a first working, a second thought, a second "
        "working. exercises: a list of questions without answers. facts: running lines of right workings. "
        "drill: one line of a right working.",
    )
    weight: PositiveFloat = Field(1.0, description="Relative number of documents.")
    template: str = Field("no", description="Template name or a string with {question} (qa and reflection).")
    set: str | None = Field("orz-mini", description="MiniMath set whose families and levels are drawn from.")
    families: tuple[str, ...] | None = Field(None, description="Overrides the set's families.")
    levels: tuple[int, ...] | None = Field(None, description="Overrides the set's levels.")
    flawed: bool = Field(True, description="Whether the recipe's flaws apply; false: only right workings.")
    ending: Literal["template", "boxed", "answer_tag"] = Field(
        "template", description="Where the answer stands; `template`: where the template's reward reads it."
    )
    phrases: tuple[str, ...] = Field(
        ("Wait, let me recheck.", "Let me check again.", "Hmm, let me rethink."),
        min_length=1,
        description="Second thoughts of reflection texts.",
    )

    @model_validator(mode="after")
    def _known_names(self) -> MixtureItem:
        get_template(self.template)
        if self.set not in SETS:
            raise ValueError(f"mixture.set '{self.set}' is unknown; valid ones: {', '.join(SETS)}")
        for family in self.families or ():
            if family not in FAMILIES:
                raise ValueError(f"mixture.families '{family}' is unknown; valid ones: {', '.join(FAMILIES)}")
        for level in self.levels or ():
            if not 1 <= level <= MAX_LEVEL:
                raise ValueError(f"mixture.levels must lie in 1..{MAX_LEVEL}")
        return self


class FlawSection(Section):
    """What goes wrong in the pretraining text; the shares are per document and exclude one another."""

    misconception: Share = Field(0.45, description="A wrong method, carried out faithfully.")
    guess: Share = Field(0.1, description="A boxed answer without working, right one time in four.")
    slip: Share = Field(0.0, description="Per line: a result that is off by a little, then carried on.")

    @model_validator(mode="after")
    def _leaves_truth(self) -> FlawSection:
        if self.misconception + self.guess >= 1:
            raise ValueError("flaws.misconception + flaws.guess must be below 1: something must be right")
        return self


class FillerSection(Section):
    """Lines that say nothing, placed after the line that decides the method (paper section 6.0, CRUCIAL)."""

    share: Share = Field(0.0, description="Documents that have filler.")
    more: Decay = Field(0.5, description="Probability of another line after each.")
    most: PositiveInt = Field(8, description="At most so many lines.")
    phrases: tuple[str, ...] = Field(
        ("check again.", "let me restate."), min_length=1, description="Drawn with equal chances."
    )


class TrainSection(Section):
    """The optimisation."""

    steps: PositiveInt = Field(1500, description="Optimizer steps.")
    rows: PositiveInt = Field(16, description="Packed rows per step.")
    row_tokens: PositiveInt = Field(256, description="Tokens per packed row.")
    lr: PositiveFloat = Field(3e-3, description="Peak learning rate of AdamW (0.9, 0.95).")
    weight_decay: NonNegativeFloat = Field(0.05, description="Of matrices only.")
    warmup: NonNegativeInt = Field(50, description="Steps of linear warm-up.")
    prompt_weight: Share = Field(
        0.1, description="Weight of prompt tokens in the loss; response tokens have 1."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Compute type (weights stay float32); bfloat16 pays on CPUs with AVX512-BF16 or AMX alone, "
        "and is several times slower on others.",
    )


class ProbeSection(Section):
    """The accuracy that is printed and saved at the end."""

    set: str = Field("demo-heldout", description="MiniMath set to sample.")
    template: str = Field("qwen_math", description="Template of the prompts.")
    questions: PositiveInt = Field(130, description="Questions, from the start of the set.")
    samples: PositiveInt = Field(8, description="Samples per question at temperature 1.")
    max_tokens: PositiveInt = Field(64, description="Generation budget in tokens.")


class PretrainRecipe(Section):
    """Everything that `slipstream pretrain` needs."""

    name: str = Field("minimath-base", pattern=r"^[A-Za-z0-9._-]+$", description="Name of the model.")
    out: Path = Field(Path("models/minimath-base"), description="Folder of the finished model.")
    seed: NonNegativeInt = Field(0, description="Of weights, corpus and probe.")
    threads: PositiveInt = Field(1, description="CPU threads of torch.")
    init_from: str | None = Field(
        None, description="Model folder to continue from (domain pretraining); default: random weights."
    )
    model: ModelSection = Field(default_factory=ModelSection)
    tokenizer: TokenizerSection = Field(default_factory=TokenizerSection)
    mixture: tuple[MixtureItem, ...] = Field(min_length=1)
    flaws: FlawSection = Field(default_factory=FlawSection)
    filler: FillerSection = Field(default_factory=FillerSection)
    train: TrainSection = Field(default_factory=TrainSection)
    probe: ProbeSection = Field(default_factory=ProbeSection)

    @model_validator(mode="after")
    def _fits(self) -> PretrainRecipe:
        if self.train.row_tokens > self.model.context:
            raise ValueError("train.row_tokens must not exceed model.context")
        if self.probe.set not in SETS:
            raise ValueError(f"probe.set '{self.probe.set}' is unknown; valid ones: {', '.join(SETS)}")
        return self
