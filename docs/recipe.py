"""The page of the recipe's ingredients, from the `Recipe:` lines of the docstrings beside the code.

A docstring says what it implements in a line of its own, which may be wrapped:

    Recipe: INGREDIENT; SOURCE; CONFIG KEYS; TEST

- SOURCE: `NAME (ARXIV ID)`, and if known `section`, `eq.` or `table` and its number; or
  `OWNER/REPOSITORY` and a file of it, where no paper says it; or `ours`.
- CONFIG KEYS: `a.b`, or `a.b=row` of a registry; `x[]` is each entry of a list, `*` each name;
  `function(argument)` where it is asked for in a call; `always` where nothing turns it off.
- TEST: `tests/FILE.py::FUNCTION`, which would fail if the ingredient were wrong.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from radio.config import Config, OptimizerConfig
from radio.errors import RadioError

PACKAGES = ("radio", "student", "teachers")
MARK = "Recipe:"
PAPERS = {  # in the order of the page
    "2312.06709": "AM-RADIO",
    "2410.01680": "PHI-S",
    "2412.07679": "RADIOv2.5",
    "2502.16025": "FeatSharp",
    "2601.17237": "C-RADIOv4",
    "2408.05088": "UNIC",
    "1603.09382": "Stochastic depth",
    "1708.06832": "AdaLoss",
    "2103.17239": "CaiT",
    "2203.16527": "ViTDet",
    "2210.09461": "ToMe",
    "2303.17604": "ToMe SD",
    "2406.16540": "DAMP",
    "2508.10104": "DINOv3",
}
REGISTRIES = {  # every row is an ingredient
    "codec": ("radio/targets/codec.py", "_CARRIERS"),
    "losses.balance": ("radio/training/balance.py", "BALANCES"),
    "losses.feature": ("radio/training/losses.py", "FEATURE_LOSSES"),
    "losses.grid": ("radio/targets/grid.py", "GRIDS"),
    "losses.summary": ("radio/training/losses.py", "SUMMARY_LOSSES"),
    "stages[].partitions.*.views.*": ("radio/targets/view_modes.py", "VIEW_MODES"),
    "student.adaptor_kind": ("student/adaptors.py", "KINDS"),
    "teachers.*.standardizer": ("radio/targets/standardizer_kinds.py", "STANDARDIZERS"),
}
PAPER = re.compile(r"(?P<name>.+) \((?P<id>\d{4}\.\d{5})\)(?: (?P<place>(section|eq\.|table) .+))?")
UPSTREAM = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?: (?P<place>[\w./-]+))?")
CALL = re.compile(r"(\w+)\((\w+)\)")
TEST = re.compile(r"(tests/\w+\.py)::(test_\w+)")
Scope = ast.Module | ast.ClassDef | ast.FunctionDef
Functions = dict[str, set[str]]  # argument names by the name of a function


@dataclasses.dataclass(frozen=True)
class Row:
    """One ingredient; `where` is its file and, unless the module says it, its function."""

    ingredient: str
    source: str
    keys: tuple[str, ...]
    test: str
    where: str


def table(root: Path) -> str:
    """Return the table of the repository at `root`.

    Raises:
        RadioError: lines that are malformed or name what is not there, and ingredients without a
            line, all at once.
    """
    rows, wrong = read(root)
    wrong += mistakes(rows, root)
    if wrong:
        raise RadioError("\n".join([*wrong, "docs/recipe.py says how a line is written"]))
    head = "| ingredient | paper or code | where in it | config key | function | test |"
    return "\n".join([head, f"|{'---|' * 6}", *map(_line, sorted(rows, key=_order))]) + "\n"


def read(root: Path) -> tuple[list[Row], list[str]]:
    """Return the rows of every docstring, and what is wrong with those that are none."""
    rows, wrong = list[Row](), list[str]()
    for path in _files(root):
        name, text = str(path.relative_to(root)), path.read_text()
        entries = [
            (f"{name}: {function}" if function else name, entry)
            for function, docstring in _docstrings(ast.parse(text))
            for entry in _entries(docstring)
        ]
        if text.count(MARK) != len(entries):
            wrong.append(f"{name}: a '{MARK}' does not begin a line of a docstring")
        for where, entry in entries:
            fields = tuple(field.strip() for field in entry.removesuffix(".").split(";"))
            if len(fields) != 4 or not all(fields):
                wrong.append(f"{where}: '{entry}' has not the four parts of a recipe's line")
                continue
            ingredient, source, keys, test = fields
            rows.append(Row(ingredient, source, tuple(re.split(r",\s*", keys)), test, where))
    return rows, wrong


def mistakes(rows: list[Row], root: Path) -> list[str]:
    """Return what the rows name that does not exist, and the registries' rows without one."""
    functions, known, tests = _functions(root), registries(root), _tests(rows, root)
    wrong = []
    for row in rows:
        found = [_source_mistake(row.source), _test_mistake(row.test, tests)]
        found += [_key_mistake(key, functions, known) for key in row.keys]
        wrong += [f"{row.where}: {mistake}" for mistake in found if mistake]
    said = {key for row in rows for key in row.keys}
    for key, values in known.items():
        lacking = [value for value in values if f"{key}={value}" not in said]
        wrong += [f"{key}={value} has no '{MARK}' line in any docstring" for value in lacking]
    return wrong


def registries(root: Path) -> dict[str, list[str]]:
    """Return the values of each key that is looked up in a registry, without importing it."""
    known = {key: _rows_of(root / file, name) for key, (file, name) in REGISTRIES.items()}
    # timm knows more than a hundred optimizers; those that our own recipes take are ingredients.
    optimizers = {OptimizerConfig().name}
    for path in sorted((root / "configs" / "experiment").glob("*.yaml")):
        optimizers.add(yaml.safe_load(path.read_text()).get("optimizer", {}).get("name"))
    return known | {"optimizer.name": sorted(optimizers - {None})}


def _rows_of(path: Path, name: str) -> list[str]:
    """Return the keys of a dictionary, or the entries of a tuple, that a module assigns."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and target.id == name and node.value is not None:
                rows = node.value.keys if isinstance(node.value, ast.Dict) else [node.value]
                found = [ast.literal_eval(row) for row in rows if row is not None]
                return list(found if isinstance(node.value, ast.Dict) else found[0])
    raise RadioError(f"{path} has no registry {name}; docs/recipe.py looks for it there")


def _source_mistake(source: str) -> str | None:
    if source == "ours":
        return None
    if paper := PAPER.fullmatch(source):
        expected = PAPERS.get(paper["id"])
        if expected == paper["name"]:
            return None
        if expected is None:
            return f"'{paper['id']}' is not among PAPERS of docs/recipe.py"
        return f"{paper['id']} is '{expected}', not '{paper['name']}'"
    if UPSTREAM.fullmatch(source):
        return None
    return f"'{source}' is no source"


def _test_mistake(test: str, tests: dict[str, set[str]]) -> str | None:
    parts = TEST.fullmatch(test)
    if parts is None:
        return f"'{test}' is no test; write tests/FILE.py::test_NAME"
    if parts[1] not in tests:
        return f"there is no {parts[1]}"
    return None if parts[2] in tests[parts[1]] else f"{parts[1]} has no {parts[2]}"


def _tests(rows: list[Row], root: Path) -> dict[str, set[str]]:
    """Return the functions of each file of tests that the rows name, where it exists."""
    names = {row.test.split("::")[0] for row in rows}
    trees = {
        name: ast.parse((root / name).read_text()) for name in names if (root / name).is_file()
    }
    return {
        name: {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        for name, tree in trees.items()
    }


def _key_mistake(key: str, functions: Functions, known: dict[str, list[str]]) -> str | None:
    if key == "always":
        return None
    if call := CALL.fullmatch(key):
        missing = call[2] not in functions.get(call[1], set())
        return f"no function {call[1]} takes an argument {call[2]}" if missing else None
    name, _, value = key.partition("=")
    if not _is_key(name):
        return f"radio.config has no key {name}"
    if not value:
        return None
    if name not in known:
        return f"{name} has no registry; write the key alone"
    return None if value in known[name] else f"{name} has no row {value}; {', '.join(known[name])}"


def _is_key(key: str) -> bool:
    hint: Any = Config
    for part in re.sub(r"\[\]", ".[]", key).split("."):
        if part in ("*", "[]"):
            if get_origin(hint) is not {"*": dict, "[]": list}[part]:
                return False
            hint = get_args(hint)[-1]
        elif dataclasses.is_dataclass(hint) and part in (hints := get_type_hints(hint)):
            hint = hints[part]
        else:
            return False
    return True


def _files(root: Path) -> list[Path]:
    return sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))


def _docstrings(node: Scope, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted name, docstring) of a module, its classes and all their functions."""
    yield name, ast.get_docstring(node) or ""
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}".lstrip("."))


def _entries(docstring: str) -> Iterator[str]:
    """Yield what follows each mark, up to the next one or an empty line."""
    for paragraph in docstring.split("\n\n"):
        for part in re.split(rf"^{MARK}", paragraph, flags=re.MULTILINE)[1:]:
            yield " ".join(part.split())


def _functions(root: Path) -> Functions:
    found: Functions = {}
    for path in _files(root):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                names = {each.arg for each in [*node.args.args, *node.args.kwonlyargs]}
                found.setdefault(node.name, set()).update(names)
    return found


def _order(row: Row) -> tuple[int, str, str]:
    """Papers first and as listed, then code without a paper, then our own."""
    if paper := PAPER.fullmatch(row.source):
        return list(PAPERS).index(paper["id"]), "", row.where
    return len(PAPERS) + (row.source == "ours"), row.source.split(" ")[0], row.where


def _line(row: Row) -> str:
    source, place = row.source, ""
    if paper := PAPER.fullmatch(source):
        source = f"[{paper['name']}](https://arxiv.org/abs/{paper['id']})"
        place = paper["place"] or ""
    elif upstream := UPSTREAM.fullmatch(source):
        source = f"[{upstream['name']}](https://github.com/{upstream['name']})"
        place = upstream["place"] or ""
    keys = " ".join(key if key == "always" else f"`{key}`" for key in row.keys)
    cells = (row.ingredient, source, place, keys, f"`{row.where}`", f"`{row.test}`")
    return f"| {' | '.join(cells)} |"
