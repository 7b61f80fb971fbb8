"""What the command line prints: results on stdout, messages on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from radio.errors import RadioError

# Of torchrun's processes the leading one speaks; all of them may report an error.
out = Console(quiet=os.environ.get("RANK", "0") != "0")
err = Console(stderr=True)


def print_plan(config: Any, count: bool = True) -> None:
    """Print the resolved configuration and what the stages would do."""
    from radio.config import to_yaml
    from radio.training.cost import GPU_TFLOPS, stage_cost

    out.print(to_yaml(config), highlight=False, markup=False)
    for number, stage in enumerate(config.stages):
        for name, partition in stage.partitions.items():
            views = ", ".join(f"{teacher} {mode}" for teacher, mode in partition.views.items())
            out.print(
                f"stage {number}, {stage.steps} steps, partition {name}: "
                f"{partition.batch} views at {partition.image_size} px; {views}"
            )
        cost = stage_cost(config, stage)
        shares = ", ".join(f"{name} {tflop:,.3g}" for name, tflop in cost.teachers.items())
        out.print(
            f"stage {number}, TFLOP a step: {shares}, student {cost.student:,.3g}; in all "
            f"{cost.gpu_hours:,.3g} hours of an A100 at {GPU_TFLOPS:.0f} TFLOP/s"
        )
    if count:
        from radio.targets.stream import open_sources

        sources = open_sources(config)
        sizes = ", ".join(f"{len(source)} {split}" for split, source in sources.items())
        out.print(f"pictures: {sizes}")


def rehearse_and_print(config: Any) -> None:
    """Run one step at full size and print what every model takes."""
    from radio.training.rehearsal import rehearse
    from radio.training.rehearsal_report import rehearsal_tables

    result = rehearse(config)
    for table in rehearsal_tables(result):
        Console(width=240).print(table)  # a broken line is still one to read, a cut cell is not
    out.print(f"as JSON   {Path(config.out) / 'rehearsal.json'}")


def print_result(result: Any) -> None:
    """Print the held-out table before and after, and what was damaged."""
    from radio.evaluation.tables import held_out_table

    if result.after:
        out.print(held_out_table(result.before, result.after))
    else:
        out.print("no data.val: nothing was measured on held-out pictures")
    if result.damaged:
        err.print(f"damaged pictures, replaced by others: {len(result.damaged)}")
        for key, reason in list(result.damaged.items())[:10]:
            err.print(f"  {key}: {reason}", highlight=False, markup=False)


def check_json(file: str | None) -> None:
    """Refuse a file that `write_json` could not write, before what takes long."""
    if file is None or file == "-":
        return
    path = Path(file)
    if path.is_dir() or not path.parent.is_dir():
        what = f"{path} is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise RadioError(f"--json: {what}; expected a file in a folder that exists, or -")


def write_json(value: Any, file: str | None) -> None:
    """Write a value to a file, - being stdout; nothing where no file is asked for."""
    if file == "-":
        sys.stdout.write(json.dumps(value, indent=2) + "\n")
    elif file is not None:
        Path(file).write_text(json.dumps(value, indent=2) + "\n")


def print_status(found: Any) -> None:
    """Print where a run stands, a line per teacher, and what to do."""
    from radio.training.report import duration

    saved = f"step {found.saved} is saved" if found.saved else "nothing is saved yet"
    left = "" if found.eta_seconds is None else f", {duration(found.eta_seconds)} to go"
    out.print(f"{found.state}: step {found.step} of {found.planned}{left}; {saved}")
    if found.seconds_per_step is not None:
        out.print(f"{found.seconds_per_step:.2f} s a step, {found.images_per_second:.1f} images/s")
        table = Table(box=None)
        for column in ("teacher", "own s", "waited for", "MB a step"):
            table.add_column(column, justify="left" if column == "teacher" else "right")
        for each in found.teachers:
            waited = f"{each.wait_share:.0%}"
            mb = f"{each.num_bytes / 1e6:.2f}"
            table.add_row(each.name, f"{each.busy_seconds:.2f}", waited, mb)
        out.print(table)
    out.print(found.advice, highlight=False, markup=False)


def print_teachers(listed: Mapping[str, Any]) -> None:
    """Print a line per teacher."""
    table = Table(title="teacher@teachers.NAME=TAG", box=None)
    columns = (
        "tag",
        "kind",
        "summary",
        "features",
        "px",
        "stride",
        "M",
        "GFLOP",
        "views",
        "weights",
    )
    for column in columns:
        numeric = column in {"summary", "features", "px", "stride", "M", "GFLOP"}
        table.add_column(column, justify="right" if numeric else "left", no_wrap=True)
    for name, teacher in listed.items():
        card = teacher.card
        table.add_row(
            name,
            teacher.kind,
            str(card.summary_dim or "-"),
            str(card.feature_dim),
            str(card.native_size),
            str(card.stride),
            f"{card.parameters_m:,.1f}",
            f"{card.gflops:,.1f}",
            " ".join(card.view_modes),
            card.weights_licence,
        )
    # A line that a narrow terminal breaks is still one to read, grep and copy; a cut cell is not.
    Console(width=200).print(table)


def print_findings(findings: Sequence[Any]) -> None:
    """Print what `radio doctor` found."""
    for finding in findings:
        mark = "[green]ok[/]" if finding.fine else "[red]no[/]"
        way_out = "" if finding.fine else f"  -> {finding.way_out}"
        out.print(f"{mark}  {finding.what:18} {finding.found}{way_out}", highlight=False)
