"""The reference table of docs/recipes.md, from the schema's own field texts.

`python -m deploy.recipe_reference` writes it; a test keeps it in step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from common.recipe import Recipe
from common.recipe.load import REPOSITORY
from common.recipe.schema import Section

PAGE = REPOSITORY / "docs" / "recipes.md"
MARK = "<!-- reference: written by `python -m deploy.recipe_reference` -->\n"


def _section(annotation: Any) -> type[Section]:
    candidates = (annotation, *getattr(annotation, "__args__", ()))
    return next(c for c in candidates if isinstance(c, type) and issubclass(c, Section))


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def reference() -> str:
    """Markdown: one table per section of a recipe."""
    lines = []
    for name, field in Recipe.model_fields.items():
        section = _section(field.annotation)
        lines += [
            f"### [{name}]",
            "",
            (section.__doc__ or "").strip(),
            "",
            "| key | default | what |",
            "|---|---|---|",
        ]
        for key, inner in section.model_fields.items():
            what = (inner.description or "").replace("|", "\\|")
            lines.append(f"| `{key}` | {_default(inner.default)} | {what} |")
        lines.append("")
    return "\n".join(lines)


def with_reference(page: str) -> str:
    """The page with its reference part written anew."""
    return page[: page.index(MARK)] + MARK + "\n" + reference()


def main(page: Path = PAGE) -> None:
    """Rewrite the page."""
    page.write_text(with_reference(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
