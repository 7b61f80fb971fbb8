from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_generated_pages_are_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_file_that_the_docs_name_exists() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for path in re.findall(
            r"`((?:radio|teachers|student|ray_jobs|docs|examples|configs)/[\w/.]+)",
            page.read_text(),
        ):
            assert (ROOT / path.rstrip(".")).exists(), f"{page.name} names {path}"


def test_every_dependency_is_accounted_for() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    said = (ROOT / "docs" / "dependencies.md").read_text()
    for requirement in project["dependencies"]:
        name = re.split(r"[\[>=<]", requirement)[0]
        assert name in said, f"docs/dependencies.md does not say why {name}"
