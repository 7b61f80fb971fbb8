"""The command line: one function per verb, each the same as its Python function.

Results go to stdout, logs to stderr. Exit codes: 0 done, 1 crash, 2 something the user can mend,
3 done with some inputs failed, 130 stopped by Ctrl-C (resumable).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from radio.errors import RadioError

app = typer.Typer(
    name="radio",
    help="Distil several vision foundation models into one student.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
# Of torchrun's processes the leading one speaks; all of them may report an error.
out = Console(quiet=os.environ.get("RANK", "0") != "0")
err = Console(stderr=True)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Hydra overrides, for example experiment=demo optimizer.lr=5e-4"),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print config and plan; run nothing.")]
JsonFile = Annotated[
    str | None, typer.Option("--json", help="Write the result as JSON to this file; - = stdout.")
]


@app.command()
def demo(overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Show the whole idea on 14 photographs: four teachers, one student, one encoder folder.

    Writes runs/demo/{report.html, metrics.jsonl, checkpoints/, encoder/, features/}. The teachers
    are the trained pocket ones, the student is new: the demo shows how it begins to learn from
    them, and `radio.load("pocket")` is what experiment=pocket made of more pictures.
    """
    from ray_jobs.demo import demo as run_demo
    from ray_jobs.demo import demo_config

    config = demo_config(overrides or [])
    if dry_run:
        _print_plan(config, count=False)
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    result = run_demo(config)
    _print_result(result.run)
    out.print(f"report    {result.run.out / 'report.html'}")
    out.print(
        f"encoder   {result.encoder}  ({result.parameters / 1e6:.1f} M parameters, loaded by "
        "transformers.AutoModel without remote code)"
    )
    out.print(f"features  {result.features}")


@app.command()
def train(overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Distil a student; the same command resumes its `out` folder exactly.

    radio train experiment=demo data.train=photos/ out=runs/mine
    radio train experiment=demo "data.train='shards/train-{000000..000009}.tar'"
    radio train experiment=radio_v2_5_l rehearsal=true (one step at full size on seeded weights)
    """
    from radio.training.rehearsal_config import rehearsal_config

    config = rehearsal_config(overrides or [])
    if dry_run:
        _print_plan(config, count=not config.rehearsal)
        return
    if config.rehearsal:
        _rehearse(config)
        return
    if config.stream == "ray":
        from ray_jobs.train import train as train_on_ray

        result = train_on_ray(config)
    else:
        from radio.training.distill import distill

        result = distill(config)
    for name, student in {"": result, **result.students}.items():
        if name:
            out.print(f"\nstudent {name}")
        _print_result(student)
        out.print(f"report    {student.out / 'report.html'}")
        out.print(f"next      radio fuse {student.out} {student.out / 'encoder'}")


@app.command()
def fit(overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Fit the teachers' standardizers (PHI-S) and write them into `out`/standardizers.

    With `cache` every target that `radio train` will ask for is made, too, and kept there.
    """
    from radio.config import load

    config = load(overrides or [])
    if dry_run:
        _print_plan(config)
        return
    from radio.progress import ProgressDisplay

    with ProgressDisplay() as progress:
        progress.phase("waiting for teachers")
        if config.stream == "ray":
            from ray_jobs.fit import fit_on_ray

            files = fit_on_ray(config, progress)
        else:
            from radio.targets.cache import open_stream
            from radio.targets.stream import LocalStream
            from radio.training.fill import fit_and_fill

            with contextlib.closing(open_stream(config, lambda: LocalStream(config))) as stream:
                files = fit_and_fill(config, stream, progress)
    for name, file in files.items():
        out.print(f"{name:12} {file.path}")


@app.command()
def status(
    run: Annotated[Path, typer.Argument(help="The folder of a run, its out=.")],
    json_file: JsonFile = None,
) -> None:
    """Say where a run stands, and who waits for whom."""
    from radio.training.report import duration
    from radio.training.status import status as status_of

    found = status_of(run)
    _write_json(found.as_dict(), json_file)
    if json_file == "-":
        return
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


@app.command()
def fuse(
    source: Annotated[
        Path, typer.Argument(help="A run, a checkpoint, or one of NVIDIA's .pth.tar files.")
    ],
    target: Annotated[Path, typer.Argument(help="The encoder folder to write.")],
    half: Annotated[bool, typer.Option("--half", help="Store float16: half the bytes.")] = False,
) -> None:
    """Fuse a checkpoint into one encoder folder that transformers loads natively."""
    from radio.encoder.fuse import fuse as fuse_checkpoint

    out.print(fuse_checkpoint(source, target, half))


@app.command()
def encode(
    sources: Annotated[list[str], typer.Argument(help="Folders, globs, pictures or tars.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    model: Annotated[
        Path | None,
        typer.Option("--model", "-m", help="An encoder folder, or the name of one that ships."),
    ] = None,
    features: Annotated[
        str, typer.Option(help="Comma-separated: summary,features,clip:summary,sam:features")
    ] = "summary",
    size: Annotated[int | None, typer.Option(help="Square side in pixels.")] = None,
    merge_to: Annotated[int | None, typer.Option(help="Merge patch features to this many.")] = None,
    batch: Annotated[int, typer.Option(help="Pictures per forward.")] = 16,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier extraction.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Extract features of pictures into parquet."""
    from radio.encoder.encoder import load
    from radio.encoder.shipped import default
    from radio.extraction.encode import encode as encode_sources
    from radio.progress import ProgressDisplay

    _check_json(json_file)
    encoder = load(default() if model is None else model)
    with ProgressDisplay() as progress:
        progress.phase("encoding")
        result = encode_sources(
            sources,
            output,
            encoder,
            features=tuple(features.split(",")),
            size=size,
            merge_to=merge_to,
            batch=batch,
            overwrite=overwrite,
            progress=progress.update,
        )
    _write_json(dataclasses.asdict(result), json_file)
    if json_file != "-":
        rate = f"{result.rows / result.seconds:.1f} pictures/s"
        out.print(f"{result.ok} pictures encoded, {result.failed} failed, {rate}: {output}")
    if result.failed:
        raise typer.Exit(3)


@app.command()
def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            help="An encoder folder or shipped name (pocket), a run, a checkpoint, a teacher's "
            "name or YAML, a timm name, or pixels."
        ),
    ],
    task: Annotated[
        str,
        typer.Option(
            help="fidelity, knn, linear, zero-shot, retrieval, segmentation, masks, mode-switch, "
            "equivariance, rank, similarity; several with commas."
        ),
    ] = "fidelity",
    data: Annotated[
        str | None, typer.Option(help="A folder of train-*.tar, val-*.tar; a run's data.val.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Side in px; else the target's own.")] = None,
    features: Annotated[str | None, typer.Option(help="What is probed: clip:summary.")] = None,
    classes: Annotated[
        str | None, typer.Option(help="Score among 1,2,3 or those of @FILE.")
    ] = None,
    adaptor: Annotated[str | None, typer.Option(help="An encoder's: clip, sam, ...")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Of the text tower, if none is with its weights: a folder.")
    ] = None,
    against: Annotated[str | None, typer.Option(help="Similarity: the second target.")] = None,
    sizes: Annotated[str | None, typer.Option(help="Resolutions of a curve: 128,192.")] = None,
    prompt: Annotated[str, typer.Option(help="Masks: point or box.")] = "box",
    template: Annotated[
        list[str] | None, typer.Option(help="Zero-shot: a text with {}, or @FILE; repeatable.")
    ] = None,
    ignore: Annotated[int | None, typer.Option(help="Label maps' value not scored.")] = None,
    seed: Annotated[int, typer.Option(help="Of resampling and probes.")] = 0,
    figure: Annotated[Path | None, typer.Option(help="Draw the result: .png or .svg.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure any encoder, teacher or model by the same code.

    radio evaluate encoder/ --task knn --data photos/
    radio evaluate dinov2_b14_reg --task segmentation --data streets/ --size 224
    radio evaluate runs/demo (fidelity: a trained student against its teachers)
    """
    from radio.evaluation.command import run, whole_numbers
    from radio.evaluation.result import Options

    options = Options(
        size=size,
        features=features,
        classes=whole_numbers("--classes", classes),
        adaptor=adaptor,
        tokenizer=None if tokenizer is None else str(tokenizer),
        against=against,
        sizes=whole_numbers("--sizes", sizes),
        prompt=prompt,
        templates=None if template is None else tuple(template),
        ignore=ignore,
        seed=seed,
    )
    _check_json(json_file)
    found, tables, failed = run(target, task.split(","), data, options, figure)
    _write_json(found, json_file)
    if json_file != "-":
        for table in tables:
            out.print(table)
    if failed is not None:
        raise failed


@app.command()
def teachers(json_file: JsonFile = None) -> None:
    """List the teachers there are: dims, cost, resolutions, view modes, licence of the weights."""
    from radio.config import choices, load_teacher

    listed = {name: load_teacher(name) for name in choices("teacher")}
    _write_json({name: dataclasses.asdict(t) for name, t in listed.items()}, json_file)
    if json_file == "-":
        return
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


@app.command()
def doctor(json_file: JsonFile = None) -> None:
    """Say what this machine can run and what is missing."""
    from radio.doctor import examine

    findings = examine()
    _write_json([dataclasses.asdict(finding) for finding in findings], json_file)
    if json_file != "-":
        for finding in findings:
            mark = "[green]ok[/]" if finding.fine else "[red]no[/]"
            way_out = "" if finding.fine else f"  -> {finding.way_out}"
            out.print(f"{mark}  {finding.what:18} {finding.found}{way_out}", highlight=False)
    if not all(finding.fine for finding in findings):
        raise typer.Exit(2)


def _print_plan(config: Any, count: bool = True) -> None:
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


def _rehearse(config: Any) -> None:
    """Run one step at full size and print what every model takes."""
    from radio.training.rehearsal import rehearse
    from radio.training.rehearsal_report import rehearsal_tables

    result = rehearse(config)
    for table in rehearsal_tables(result):
        Console(width=240).print(table)  # a broken line is still one to read, a cut cell is not
    out.print(f"as JSON   {Path(config.out) / 'rehearsal.json'}")


def _print_result(result: Any) -> None:
    from radio.evaluation.tables import held_out_table

    if result.after:
        out.print(held_out_table(result.before, result.after))
    else:
        out.print("no data.val: nothing was measured on held-out pictures")
    if result.damaged:
        err.print(f"damaged pictures, replaced by others: {len(result.damaged)}")
        for key, reason in list(result.damaged.items())[:10]:
            err.print(f"  {key}: {reason}", highlight=False, markup=False)


def _check_json(file: str | None) -> None:
    """Refuse a file that `_write_json` could not write, before what takes long."""
    if file is None or file == "-":
        return
    path = Path(file)
    if path.is_dir() or not path.parent.is_dir():
        what = f"{path} is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise RadioError(f"--json: {what}; expected a file in a folder that exists, or -")


def _write_json(value: Any, file: str | None) -> None:
    if file == "-":
        sys.stdout.write(json.dumps(value, indent=2) + "\n")
    elif file is not None:
        Path(file).write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    """Run the command line; errors of the user's making come without a traceback."""
    from radio.doctor import shadowing_package

    handler = RichHandler(console=err, show_path=False, show_level=False, markup=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    for name in ("radio", "ray_jobs"):
        logging.getLogger(name).setLevel(logging.WARNING if out.quiet else logging.INFO)
    hidden = shadowing_package()
    if hidden:
        err.print(f"error: {hidden}; install radio-distill in an environment of its own")
        sys.exit(2)
    try:
        app()
    except RadioError as error:
        err.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)
