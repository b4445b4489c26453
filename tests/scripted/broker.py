"""A real broker for tests: in a thread, or as a process with `python -m tests.scripted.broker`.

python -m tests.scripted.broker FOLDER RECIPE_JSON [--resume]
"""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from broker.main import serve
from common.errors import EXIT_RESTART
from common.recipe.schema import Recipe
from tests.scripted.wait import until


def scripted_recipe(folder: Path, **sections: dict[str, Any]) -> Recipe:
    """A small recipe whose questions, model configuration and run live in `folder`; sections are merged in."""
    model = folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps({"vocab_size": 64}))
    count = sections.get("data", {}).pop("count", 40)
    questions = folder / "questions.jsonl"
    rows = [{"uid": f"q{i}", "problem": f"{i} + 1 = ?", "answer": str(i + 1)} for i in range(count)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree: dict[str, dict[str, Any]] = {
        "run": {"name": "test", "root": folder, "steps": 5},
        "model": {"path": str(model), "max_context": 512},
        "data": {"train": str(questions), "max_epochs": 1},
        "rollout": {"group_size": 4, "max_tokens": 128},
        "batch": {"questions_per_step": 4, "optimizer_steps": 1, "max_staleness": 1},
        "broker": {"heartbeat_s": 0.1, "dead_after_s": 5.0, "durability": "memory"},
        "eval": {"every": 1000},
    }
    for name, values in sections.items():
        tree.setdefault(name, {}).update(values)
    return Recipe.model_validate(tree)


def wait_for_broker(folder: Path, starting: Callable[[], bool] = lambda: True) -> str:
    """Address of the broker that serves `folder`; no longer `starting`, and there is none: the test fails."""
    file = folder / "broker.json"  # written at one stroke

    def serves() -> bool:
        may_still_come = starting()
        assert file.exists() or may_still_come, f"the broker of {folder} did not start"
        return file.exists()

    until(serves, f"a broker in {folder}")
    return json.loads(file.read_text())["address"]


@contextmanager
def running_broker(recipe: Recipe, *, resume: bool = False, replay: Path | None = None) -> Iterator[str]:
    """A broker in a thread; yields its address. Ends with the run or with the block."""
    stop = threading.Event()
    codes: list[int] = []
    thread = threading.Thread(
        target=lambda: codes.append(
            serve(recipe, run_folder=recipe.folder, resume=resume, replay=replay, stop_event=stop)
        ),
        daemon=True,
    )
    thread.start()
    try:
        yield wait_for_broker(recipe.folder, thread.is_alive)
    finally:
        stop.set()
        thread.join(60.0)
    assert codes in ([0], [EXIT_RESTART]), "the broker did not end well"


def main() -> None:
    """Command line of a real broker on a recipe given as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    recipe = Recipe.model_validate_json(options.recipe.read_text())
    raise SystemExit(serve(recipe, run_folder=recipe.folder, resume=options.resume))


if __name__ == "__main__":
    main()
