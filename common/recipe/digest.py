"""Whether two recipes sample and score alike.

Invariant: what makes a recorded response another one (I6), or its reward, is in the digest; what a run may change
while its actors live on (budgets of the learner, a higher `run.steps`) is not.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from common.recipe.schema import Recipe

SAMPLING: dict[str, Any] = {
    "model": True,
    "lora": True,
    "rollout": True,
    "verifier": True,
    "data": {"template", "max_prompt_tokens", "reward"},
}


def sampling_digest(recipe: Recipe) -> str:
    """Names how a recipe samples and scores: equal where actors of one are actors of the other."""
    tree = recipe.model_dump(mode="json", include=SAMPLING)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]
