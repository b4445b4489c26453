"""What a schema refuses, as one sentence in the words of a recipe.

Invariant: the sentence names a setting as it stands in the recipe and what would be valid there; no word of the
validation library's reaches the reader. An unknown key comes first: mostly it is why another one is missing.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from common.errors import UserError

NAMED = 5  # further defects that one sentence names
LONGEST_VALUE = 60  # characters of what was given

_WORDS = {
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
    "value_error": "{error}",
    "string_pattern_mismatch": 'must be at most 100 letters, digits, ".", "_" or "-", and not begin with "." or "-"',
}
_KINDS = {
    "int": "must be a whole number",
    "float": "must be a number",
    "finite": "must be a finite number",
    "bool": "must be true or false",
    "string": "must be a text in quotation marks",
    "path": "must be a path in quotation marks",
}
_OF_LISTS = ("tuple_type", "list_type", "too_long", "too_short")


def explain(error: ValidationError, model: type[BaseModel]) -> UserError:
    """One sentence for whatever `model` refused."""
    errors = error.errors()
    unknown = [found for found in errors if found["type"] == "extra_forbidden"]
    if unknown:
        return _unknown_key([[str(part) for part in found["loc"]] for found in unknown], model)
    sentences: dict[str, str] = {}
    given: dict[str, str] = {}
    for found in errors:
        fields, entry = _locate(model, found["loc"])
        setting, sentence = ".".join(fields), _sentence(found, _field(model, fields), entry)
        given.setdefault(setting, _given(found))
        # A setting of several kinds is refused by each of them.
        earlier = sentences.get(setting)
        alternative = earlier and sentence not in earlier and not sentence.startswith("entry")
        sentences[setting] = (
            f"{earlier} or {sentence.removeprefix('must be ')}" if alternative else earlier or sentence
        )
    setting, *others = (
        name for name in sentences if not any(other.startswith(f"{name}.") for other in sentences)
    )
    also = f"; also wrong: {_names(others)}" if others else ""
    return UserError(f"{sentences[setting]}{given[setting]}{also}.", setting=setting or None)


def _unknown_key(found: list[list[str]], model: type[BaseModel]) -> UserError:
    first, *others = found
    valid = _keys(model, first[:-1])
    close = difflib.get_close_matches(first[-1], valid, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    also = f"; also unknown: {_names('.'.join(other) for other in others)}" if others else ""
    return UserError(f"unknown key; {hint}valid here: {', '.join(valid)}{also}.", setting=".".join(first))


def _sentence(found: Mapping[str, Any], field: FieldInfo | None, entry: int | None) -> str:
    """What would be valid in place of what was found; `entry` counts from 0 within a list."""
    kind = str(found["type"])
    if kind in _OF_LISTS or (kind == "missing" and entry is not None):
        return f"must be a list {_example(field)}"
    if kind == "missing":
        return _missing(field)
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"is a table, not a value; set one of its keys: {', '.join(_keys_of(field))}"
    words = _WORDS.get(kind) or _KINDS.get(kind.partition("_")[0])
    text = words.format(**_plain(found.get("ctx", {}))) if words else str(found["msg"])
    text = text.replace("Input should be", "must be").rstrip(".")
    return f"entry {entry + 1} {text}" if entry is not None and kind != "value_error" else text


def _plain(context: Mapping[str, Any]) -> dict[str, Any]:
    """Whole bounds without a decimal point."""
    return {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in context.items()}


def _missing(field: FieldInfo | None) -> str:
    section = _section(field.annotation) if field else None
    if section is not None:
        wanted = [name for name, inner in section.model_fields.items() if inner.is_required()]
        return f"the table is missing; it needs {' and '.join(wanted)}"
    about = field.description.rstrip(".") if field and field.description else ""
    return f"is missing: {about}" if about else "is missing"


def _given(found: Mapping[str, Any]) -> str:
    value = found.get("input")
    if found["type"] == "value_error" or isinstance(value, Mapping):
        return ""
    shown = repr(value)
    return f" (given: {shown if len(shown) <= LONGEST_VALUE else shown[:LONGEST_VALUE] + '...'})"


def _names(settings: Iterable[str]) -> str:
    names = [setting or "a contradiction" for setting in settings]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _example(field: FieldInfo | None) -> str:
    if field is None:
        return "of values"
    if _section(field.annotation) is not None:
        return "of tables, each under a heading in double brackets"
    if isinstance(field.default, tuple) and field.default:
        return f"such as {json.dumps(field.default)}"
    return "such as [1, 2]" if "int" in str(field.annotation) else 'such as ["a", "b"]'


def _locate(model: type[BaseModel], location: Iterable[Any]) -> tuple[list[str], int | None]:
    """The keys that stand in the recipe (not the kinds that a value was tried as), and the entry of a last list."""
    keys: list[str] = []
    entry: int | None = None
    at: type[BaseModel] | None = model
    for part in location:
        if isinstance(part, int):
            entry = part
        elif at is not None and part in at.model_fields:
            if entry is not None:
                keys.append(str(entry))
            keys.append(str(part))
            entry, at = None, _section(at.model_fields[part].annotation)
    return keys, entry


def _field(model: type[BaseModel], keys: list[str]) -> FieldInfo | None:
    at: type[BaseModel] | None = model
    field = None
    for key in keys:
        if at is not None and key in at.model_fields:
            field = at.model_fields[key]
            at = _section(field.annotation)
    return field


def _keys(model: type[BaseModel], location: list[str]) -> list[str]:
    """The keys of the table at a location."""
    field = _field(model, location)
    return _keys_of(field) if location else list(model.model_fields)


def _keys_of(field: FieldInfo | None) -> list[str]:
    section = _section(field.annotation) if field else None
    return list(section.model_fields) if section else []


def _section(annotation: Any) -> type[BaseModel] | None:
    """The table that an annotation stands for: itself, an optional one, or a list of them."""
    candidates = (annotation, *get_args(annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
