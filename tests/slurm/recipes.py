"""A recipe for a real broker and scripted peers, as a file on the cluster's shared folder."""

from __future__ import annotations

import json
from pathlib import Path

RECIPE = """\
[run]
name = "{name}"
steps = {steps}

[model]
path = "model"
dtype = "float32"
max_context = 512

[data]
train = "questions.jsonl"
max_epochs = 1

[rollout]
group_size = 4
max_tokens = 128

[batch]
questions_per_step = 4
optimizer_steps = 1

[broker]
heartbeat_s = 0.2
dead_after_s = 5.0

[eval]
every = 1000

[launch]
device = "cpu"

[tracking]
enabled = false
"""

CONFIG = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "vocab_size": 64,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}


def write_recipe(folder: Path, *, name: str = "demo", steps: int = 40) -> Path:
    """Write the recipe, its model's configuration and one epoch of questions; returns the recipe's path."""
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(CONFIG))
    (model / "tokenizer.json").write_text("{}")
    rows = [{"uid": f"q{i}", "problem": f"{i} + 1 = ?", "answer": str(i + 1)} for i in range(4 * steps)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / f"{name}.toml"
    path.write_text(RECIPE.format(name=name, steps=steps))
    return path
