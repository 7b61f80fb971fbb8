"""The command line: one function per verb, each the same as its Python function.

Results go to stdout, logs to stderr. Exit codes: 0 done, 1 crash, 2 something the user can mend,
3 done with some inputs failed, 130 stopped by Ctrl-C (resumable).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.logging import RichHandler

from radio.errors import RadioError
from radio.terminal import (
    check_json,
    err,
    out,
    print_findings,
    print_plan,
    print_result,
    print_status,
    print_teachers,
    rehearse_and_print,
    write_json,
)

app = typer.Typer(
    name="radio",
    help="Distil several vision foundation models into one student.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Hydra overrides, for example experiment=demo optimizer.lr=5e-4"),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print config and plan; run nothing.")]
RayAddress = Annotated[
    str | None,
    typer.Option("--ray", help="Work in processes of a Ray cluster: auto, local, or its address."),
]
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
        print_plan(config, count=False)
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    result = run_demo(config)
    print_result(result.run)
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
        print_plan(config, count=not config.rehearsal)
        return
    if config.rehearsal:
        rehearse_and_print(config)
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
        print_result(student)
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
        print_plan(config)
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
    from radio.training.status import status as status_of

    found = status_of(run)
    write_json(found.as_dict(), json_file)
    if json_file == "-":
        return
    print_status(found)


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
    ray: RayAddress = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes, with --ray.")] = 2,
    json_file: JsonFile = None,
) -> None:
    """Extract features of pictures into parquet."""
    from radio.encoder.encoder import load
    from radio.encoder.shipped import DEFAULT, default
    from radio.extraction.encode import encode as encode_sources
    from radio.progress import ProgressDisplay

    check_json(json_file)
    path = default() if model is None else model
    encoder = load(path)
    with contextlib.ExitStack() as held:
        progress = held.enter_context(ProgressDisplay())
        progress.phase("encoding")
        encode_rows = None
        if ray is not None:
            from ray_jobs.encode import ray_encoded

            name = DEFAULT if model is None else str(model)
            encode_rows = held.enter_context(ray_encoded(name, _cluster(ray), workers))
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
            encode_rows=encode_rows,
        )
    write_json(dataclasses.asdict(result), json_file)
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
    ray: RayAddress = None,
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
    check_json(json_file)
    tasks = task.split(",")
    if ray is None:
        found, tables, failed = run(target, tasks, data, options, figure)
    elif tasks == ["fidelity"]:
        raise RadioError("fidelity is measured in this process; leave out --ray")
    else:
        from ray_jobs.evaluate import measure_on_ray

        on_ray = functools.partial(measure_on_ray, config=_cluster(ray))
        found, tables, failed = run(target, tasks, data, options, figure, on_ray)
    write_json(found, json_file)
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
    write_json({name: dataclasses.asdict(t) for name, t in listed.items()}, json_file)
    if json_file == "-":
        return
    print_teachers(listed)


@app.command()
def doctor(json_file: JsonFile = None) -> None:
    """Say what this machine can run and what is missing."""
    from radio.doctor import examine

    findings = examine()
    write_json([dataclasses.asdict(finding) for finding in findings], json_file)
    if json_file != "-":
        print_findings(findings)
    if not all(finding.fine for finding in findings):
        raise typer.Exit(2)


def _cluster(address: str) -> Any:
    """Return how to reach the cluster that --ray names."""
    from radio.config import ClusterConfig

    return ClusterConfig(address=address)


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
