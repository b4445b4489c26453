"""Services that a run may ask: the Hugging Face hub and MLflow."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError
from common.recipe import Recipe
from deploy.doctoring.findings import Finding, ok, problem, warning

DEADLINE_S = 5.0


def _reach(url: str) -> str | None:
    """Why an address does not answer; None when it does, whatever it says."""
    try:
        with urllib.request.urlopen(url, timeout=DEADLINE_S):
            return None
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}" if error.code >= 500 else None
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))


def check_model(recipe: Recipe) -> Iterator[Finding]:
    """The model is here, or the hub gives it."""
    from deploy.preflight import check_model as model_is_usable

    shape = model_is_usable(recipe)
    where = "local" if Path(recipe.model.path).exists() else "from the hub"
    yield ok("model", f"{recipe.model.path}, {where}: {shape.parameters:,} parameters")


def check_questions(recipe: Recipe) -> Iterator[Finding]:
    """Question sets load."""
    from deploy.preflight import check_questions as questions_load

    yield ok("questions", f"{recipe.data.train}: {questions_load(recipe):,} questions")


def check_hub() -> Iterator[Finding]:
    """The hub answers; only recipes that name models or question sets by id need it."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        yield ok("hub", "HF_HUB_OFFLINE is set: only what is cached can be used")
        return
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    reason = _reach(url)
    if reason is None:
        yield ok("hub", f"{url} answers")
    else:
        yield warning(
            "hub",
            f"{url} does not answer: {reason}",
            "only local models and question sets work here: use folders, or fill HF_HOME elsewhere",
        )


def check_mlflow(recipe: Recipe) -> Iterator[Finding]:
    """The tracking store can be written to; an outage never stops a run, so this is at most a warning."""
    from common.tracking.shipper import tracking_uri

    if not recipe.tracking.enabled:
        yield ok("mlflow", "off (tracking.enabled = false); metrics.jsonl is written either way")
        return
    uri = tracking_uri(recipe.tracking.uri, recipe.run.root)
    if uri.startswith("sqlite:///"):
        yield from _file_store(Path(uri.removeprefix("sqlite:///")))
    elif uri.startswith(("http://", "https://")):
        reason = _reach(f"{uri.rstrip('/')}/health")
        if reason is None:
            yield ok("mlflow", f"{uri} answers")
        else:
            yield warning(
                "mlflow",
                f"{uri} does not answer: {reason}",
                "start the server or correct tracking.uri; until then points are kept and delivered later",
            )
    else:
        yield ok("mlflow", f"{uri} (not looked at)")


def _file_store(path: Path) -> Iterator[Finding]:
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if os.access(folder, os.W_OK):
        yield ok("mlflow", f"local store {path}")
    else:
        yield problem("mlflow", f"{folder} cannot be written", "set tracking.uri or run.root")


def check_recipe_texts(recipe: Recipe) -> Iterator[Finding]:
    """Template and reward function exist."""
    from deploy.preflight import check_reward, check_template

    check_template(recipe)
    check_reward(recipe)
    if not recipe.run.name:
        raise UserError("the recipe has no name.", setting="run.name")
    yield ok("recipe", f"{recipe.run.name}: template and reward are usable")
