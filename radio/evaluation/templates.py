"""The sentences that a class's name is put into for zero-shot classification."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from radio.errors import RadioError

PLACE = "{}"
TEMPLATES = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a close-up photo of a {}.",
    "a blurry photo of a {}.",
    "a bright photo of a {}.",
    "a photo of a small {}.",
    "a photo of many {}.",
)


def templates_of(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the templates asked for: TEMPLATES if None, a list, one text, or `@file`.

    The file holds a template a line; empty lines are left out.

    Raises:
        RadioError: no file of that name, no template at all, or one without a place for the name.
    """
    if given is None:
        return TEMPLATES
    lines = [given] if isinstance(given, str) else list(given)
    if len(lines) == 1 and lines[0].startswith("@"):
        lines = _lines_of(Path(lines[0][1:]).expanduser())
    templates = tuple(line.strip() for line in lines if line.strip())
    if not templates:
        raise RadioError(f"no template in {given!r}; expected texts such as '{TEMPLATES[0]}'")
    for template in templates:
        if PLACE not in template:
            raise RadioError(
                f"the template '{template}' has no {PLACE}, the place of the class's name; "
                f"expected a text such as '{TEMPLATES[0]}', or @FILE with one a line"
            )
    return templates


def _lines_of(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RadioError(f"cannot read the templates of {path}: {error}") from error
