"""Read a recipe: TOML files that extend one another, then command-line overrides, then validation.

Invariant: whatever is wrong is reported as one `UserError` that names the key and what would be valid; the
order of precedence is override > file > the file it extends > defaults of the schema.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from common.errors import UserError
from common.recipe.explain import explain
from common.recipe.schema import Recipe, RunSection
from common.run_files import RECIPE_FILE

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = REPOSITORY / "recipes"
MIXTURE = "mixture"  # the key that a pretraining recipe has, and no other

Model = TypeVar("Model", bound=BaseModel)


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe: a path, or the bare name of one in recipes/ ("demo").

    Raises:
        UserError: no such file; the message names the recipe that was meant, or lists those that exist.
    """
    path = Path(name)
    if path.suffix == ".toml" and path.is_file():
        return path
    shipped = RECIPES / (path.name if path.suffix == ".toml" else f"{name}.toml")
    if shipped.is_file():
        return shipped
    raise _not_found(path)


def _not_found(path: Path) -> UserError:
    if path.is_dir():
        own = path / RECIPE_FILE
        hint = f"; that of the run in it is '{own}'" if own.is_file() else ""
        return UserError(f"'{path}' is a folder, not a recipe{hint}.")
    if path.is_file():
        return UserError(f"'{path}' is no recipe: the name of a TOML file ends in '.toml'.")
    shipped = sorted(RECIPES.glob("*.toml"))
    close = difflib.get_close_matches(path.stem, [file.stem for file in shipped], n=1)
    meant = f"did you mean '{close[0]}'?" if close else ""
    if path.suffix == ".toml" or path.name != str(path):
        return UserError(f"the file '{path}' does not exist{'; ' + meant if meant else '.'}")
    if meant:
        return UserError(f"there is no recipe '{path}'; {meant}")
    pretraining = [file.stem for file in shipped if MIXTURE in _read_with_parents(file, seen=())]
    training = [file.stem for file in shipped if file.stem not in pretraining]
    return UserError(
        f"'{path}' is neither a TOML file nor one of the shipped recipes: {', '.join(training)}; "
        f"for `slipstream pretrain`: {', '.join(pretraining)}."
    )


def load_recipe(name: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Load and validate a training recipe; `overrides` are "section.key=value" strings (TOML values)."""
    path = find_recipe(name)
    recipe = load_toml_model(Recipe, path, overrides)
    filled_in = {"name": path.stem, "recipe": path.stem} | recipe.run.model_dump(exclude_none=True)
    try:
        run = RunSection.model_validate(filled_in)
    except ValidationError:
        raise UserError(
            f"the file's name '{path.stem}' cannot be the run's (letters, digits, '.', '_', '-'): give another.",
            setting="run.name",
        ) from None
    return recipe.model_copy(update={"run": run})


def load_toml_model(model: type[Model], path: Path, overrides: Iterable[str] = ()) -> Model:
    """Read TOML with `extends`, apply overrides, validate against a strict pydantic model.

    Args:
        model: the schema; it should forbid extra keys.
        path: TOML file; its `extends` (a path relative to it, or a shipped recipe's name) is merged below it.
        overrides: "a.b=value" strings; the value is read as TOML, or as a bare string if it is not TOML.

    Raises:
        UserError: unreadable file, bad TOML, circular `extends`, unknown key, wrong type, contradiction.
    """
    tree = _read_with_parents(path, seen=())
    _refuse_other_kind(model, path, tree)
    for text in overrides:
        _apply_override(tree, text)
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise explain(error, model) from None


def _refuse_other_kind(model: type[BaseModel], path: Path, tree: Mapping[str, Any]) -> None:
    """A recipe of `slipstream pretrain` where one of `slipstream run` is asked for, or the reverse."""
    if MIXTURE in tree and MIXTURE not in model.model_fields:
        raise UserError(f"'{path.stem}' makes a base model: it is a recipe of `slipstream pretrain`.")
    if MIXTURE in model.model_fields and MIXTURE not in tree and "data" in tree:
        raise UserError(f"'{path.stem}' trains by reinforcement: it is a recipe of `slipstream run`.")


def resolved_toml(recipe: BaseModel) -> str:
    """The complete recipe, defaults included, as TOML: what `check` prints and a run folder keeps."""
    lines: list[str] = []
    _write_table(recipe.model_dump(mode="json", exclude_none=True), (), lines)
    return "\n".join(lines).strip() + "\n"


def _write_table(table: Mapping[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    plain = {k: v for k, v in table.items() if not isinstance(v, Mapping)}
    if path and plain:
        lines.extend(["", f"[{'.'.join(path)}]"])
    lines.extend(f"{_toml_key(key)} = {_toml_value(value)}" for key, value in plain.items())
    for key, value in table.items():
        if isinstance(value, Mapping):
            _write_table(value, (*path, _toml_key(key)), lines)


def _toml_key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else json.dumps(key)


def _toml_value(value: Any) -> str:
    # A JSON string, number, boolean or array of these is also TOML, except for arrays of tables.
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return "[" + ", ".join(_inline_table(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _inline_table(table: Mapping[str, Any]) -> str:
    return "{ " + ", ".join(f"{_toml_key(k)} = {_toml_value(v)}" for k, v in table.items()) + " }"


def _read_with_parents(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise UserError(
            f"{path} extends itself, by way of {', '.join(p.name for p in seen)}.", setting="extends"
        )
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}.") from None
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise UserError(f"must be the name of one recipe, in {path}.", setting="extends")
    beside = path.parent / parent
    try:
        parent_path = beside if beside.is_file() else find_recipe(parent)
    except UserError as error:
        raise UserError(f"{error} (in {path})", setting="extends") from None
    return _merge(_read_with_parents(parent_path, (*seen, path.resolve())), tree)


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged


def _apply_override(tree: dict[str, Any], text: str) -> None:
    name, separator, raw = text.partition("=")
    keys = [part.strip() for part in name.split(".")]
    if not separator or not all(keys):
        raise UserError(f"'{text}' is not of the form section.key=value.", setting="--set")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    table = tree
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise UserError(f"'{name}' goes through '{key}', which is not a table.", setting="--set")
    table[keys[-1]] = value
