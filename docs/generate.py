"""Remake the generated pages of docs/, from YAML, dataclasses and docstrings.

`python docs/generate.py --check` changes nothing and fails when a page is out of date.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, get_type_hints

from recipe import table

from radio.config import Config, PartitionConfig, StageConfig, TeacherConfig, choices, load_teacher
from radio.errors import RadioError

DOCS = Path(__file__).parent
NOTE = "<!-- made by `make docs`; do not edit -->\n"


def teachers_page() -> str:
    """Return the table of every teacher's card."""
    lines = [
        "# Teachers",
        NOTE,
        "`teacher@teachers.NAME=TAG` puts one into a run; `pretrained:` takes the tag below or a",
        "local file in the upstream layout. GFLOP counts 2 per multiply-add, for one native image.",
        "",
        "| tag | kind | weights | summary | features | px | stride | M | GFLOP | views | terms |",
        f"|{'---|' * 11}",
    ]
    for tag in choices("teacher"):
        teacher = load_teacher(tag)
        card = teacher.card
        cells = (
            tag, teacher.kind, teacher.pretrained or "seeded", card.summary_dim or "-",
            card.feature_dim, card.native_size, card.stride, f"{card.parameters_m:,.1f}",
            f"{card.gflops:,.1f}", " ".join(card.view_modes), card.weights_licence,
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def configuration_page() -> str:
    """Return every key with its type and default, section by section."""
    lines = ["# Configuration", NOTE, "Every key, as `radio/config.py` types it.", ""]
    lines += _section("", Config)
    for prefix, section in (
        ("teachers.NAME.", TeacherConfig),
        ("stages.N.", StageConfig),
        ("stages.N.partitions.NAME.", PartitionConfig),
    ):
        lines += _section(prefix, section)
    return "\n".join(lines) + "\n"


def _section(prefix: str, section: Any) -> list[str]:
    hints = get_type_hints(section)
    rows, deeper = [], []
    for field in dataclasses.fields(section):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            deeper += _section(f"{prefix}{field.name}.", hint)
            continue
        kind = str(hint).replace("radio.schema.", "").replace("typing.", "")
        kind = kind if "[" in kind or "|" in kind else hint.__name__
        rows.append(f"| `{prefix}{field.name}` | {kind.replace('|', 'or')} | {_default(field)} |")
    title = prefix.rstrip(".") or "run"
    head = [f"## {title}", "", str(section.__doc__).strip(), ""]
    return [*head, "| key | type | default |", "|---|---|---|", *rows, "", *deeper]


def _default(field: Any) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f"`{field.default_factory()}`"
    return "required" if field.default == "???" else f"`{field.default}`".replace("None", "null")


def recipe_page() -> str:
    """Return every ingredient of the recipe, and where its paper, key, code and test are."""
    lines = [
        "# Recipe",
        NOTE,
        "What the papers of the RADIO family and their neighbours add to distillation, and where",
        "it is here. A row is a `Recipe:` line of a docstring; `docs/recipe.py` says how it is",
        "written, and refuses one whose key, value or test does not exist.",
        "",
        table(DOCS.parent),
    ]
    return "\n".join(lines)


PAGES = {
    "teachers.md": teachers_page,
    "configuration.md": configuration_page,
    "recipe.md": recipe_page,
}


def main() -> int:
    """Write the pages, or with --check say which are out of date."""
    stale = []
    try:
        pages = {name: page() for name, page in PAGES.items()}
    except RadioError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    for name, text in pages.items():
        path = DOCS / name
        if not path.exists() or path.read_text() != text:
            stale.append(name)
            if "--check" not in sys.argv:
                path.write_text(text)
    if stale and "--check" in sys.argv:
        sys.stderr.write(f"out of date: {', '.join(stale)}; run make docs\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
