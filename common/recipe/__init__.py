"""Recipes: one TOML file describes a run completely.

Invariant: a recipe that loads is consistent. Every key is known, every contradiction between keys is refused
with the names of both, and nothing about a run comes from anywhere else than the resolved recipe.
"""

from common.recipe.load import find_recipe, load_recipe, load_toml_model, resolved_toml
from common.recipe.schema import (
    ActorSection,
    AlgorithmSection,
    BatchSection,
    BrokerSection,
    DataSection,
    EvalSection,
    LaunchSection,
    LearnerSection,
    LoraSection,
    ModelSection,
    Recipe,
    RolloutSection,
    RunSection,
    TrackingSection,
    VerifierSection,
    WeightsSection,
)

__all__ = [
    "ActorSection",
    "AlgorithmSection",
    "BatchSection",
    "BrokerSection",
    "DataSection",
    "EvalSection",
    "LaunchSection",
    "LearnerSection",
    "LoraSection",
    "ModelSection",
    "Recipe",
    "RolloutSection",
    "RunSection",
    "TrackingSection",
    "VerifierSection",
    "WeightsSection",
    "find_recipe",
    "load_recipe",
    "load_toml_model",
    "resolved_toml",
]
