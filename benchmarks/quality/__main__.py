"""Measure what is not stored yet, then write the page."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import benchmarks.quality
from benchmarks.markdown import write_page
from benchmarks.quality.jobs import TINY, Setting, subjects_of, teachers_called
from benchmarks.quality.measure import Measurer
from benchmarks.quality.page import page
from benchmarks.quality.store import read_stored
from radio.errors import RadioError


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=benchmarks.quality.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help="all if none is named")
    parser.add_argument("--data", default="sets", help="the folder of image sets")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality"))
    parser.add_argument("--page", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--teachers", default="pocket", help="NAME of NAME_clip, NAME_siglip, ...")
    parser.add_argument("--student", default="pocket", help="an encoder or a run")
    parser.add_argument("--control", help="the student of teachers with random weights")
    parser.add_argument("--curve", type=Path, help="a run whose checkpoints are measured")
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Measure and write."""
    given = arguments(words)
    if not given.page_only:
        _measure(given)
    link = os.path.relpath(given.out, given.page.parent)
    write_page(given.page, page(read_stored(given.out), given.teachers, str(given.out), link))


def _measure(given: argparse.Namespace) -> None:
    # Here alone: it brings the recipes' own dependencies along.
    from teachers.pocket.recipes.data import Classes

    classes = Classes.read(Path(given.data) / TINY)
    setting = Setting(
        given.teachers, teachers_called(given.teachers), classes.held_out, classes.seen
    )
    checkpoints = checkpoints_of(given.curve)
    subjects = subjects_of(setting, given.student, given.control, checkpoints)
    known = [subject.label for subject in subjects]
    unknown = sorted(set(given.subjects) - set(known))
    if unknown:
        raise RadioError(f"unknown subject '{unknown[0]}'; known: {', '.join(known)}")
    Measurer(setting, given.data, given.out).run(subjects, given.subjects)


def checkpoints_of(run: Path | None) -> list[str]:
    """Return the checkpoints of a run, oldest first.

    Raises:
        RadioError: it has none.
    """
    if run is None:
        return []
    found = [str(path.parent) for path in sorted(run.glob("checkpoints/step-*/state.yaml"))]
    if not found:
        raise RadioError(f"{run} has no checkpoints/step-*; expected the folder of a run")
    return found


if __name__ == "__main__":
    try:
        main()
    except (RadioError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
