"""Measure the findings of RADIOv2.5 and PHI-S again, and write docs/findings.md.

    python -m benchmarks.findings [NAME ...] [--data sets] [--seeds 3] [--steps N]

A run that was killed goes on, and what has been measured of the same configuration is kept: JSON in
benchmarks/results/findings/NAME/ARM-SEED.json. Runs, kept targets and pictures lie in --work. Two
processes of one thread each, with a --work and seeds (--only) of their own, do more in an hour than
one of two threads; but measure `mosaic`, which times SAM, alone.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from pathlib import Path

from benchmarks.findings import (
    layers,
    leave_one_out,
    mode_switch,
    mosaic,
    partitions,
    standardizers,
    tiling,
    token_merging,
)
from benchmarks.findings.declare import Finding
from benchmarks.findings.material import put_together
from benchmarks.findings.records import take
from benchmarks.findings.report import write_report
from benchmarks.findings.trained import Workshop
from radio.errors import RadioError

ROOT = Path(__file__).parents[2]
FINDINGS: dict[str, Finding] = {  # in the order of the page
    "tiling": tiling.FINDING,
    "mode_switch": mode_switch.FINDING,
    "mosaic": mosaic.FINDING,
    "standardizers": standardizers.FINDING,
    "deviations": standardizers.SCALED,
    "leave_one_out": leave_one_out.FINDING,
    "partitions": partitions.FINDING,
    "token_merging": token_merging.FINDING,
    "layers": layers.FINDING,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        for name in options.names:
            if name not in FINDINGS:
                raise RadioError(f"unknown finding '{name}'; known: {', '.join(FINDINGS)}")
        if not options.report_only:
            _measure(options)
        write_report(FINDINGS, options.out, options.page)
    except RadioError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.findings", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FINDINGS)}")
    parser.add_argument("--data", type=Path, default=Path("sets"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", type=int, nargs="+", metavar="SEED", help="these seeds alone")
    parser.add_argument("--threads", type=int, help="of student and teachers; those of a run else")
    parser.add_argument("--steps", type=int, help="of a run; those of the experiment if not given")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "findings")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "findings.md")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "findings")
    parser.add_argument("--teachers", default="pocket", help="pocket or demo")
    parser.add_argument("--report-only", action="store_true", help="measure nothing")
    return parser


def _measure(options: argparse.Namespace) -> None:
    """Measure seed by seed, so that an early end leaves whole seeds."""
    os.environ.setdefault("RADIO_CACHE", str(options.work / "features"))
    material = put_together(options.data, options.work / "material")
    threads = [f"threads.{who}={options.threads}" for who in ("student", "teacher")]
    overrides = tuple(threads) if options.threads else ()
    workshop = Workshop(options.work, material, options.teachers, options.steps, overrides)
    for seed in options.only or range(options.seeds):
        for name in options.names or FINDINGS:
            for arm in FINDINGS[name].arms:
                started = time.perf_counter()
                if take(name, FINDINGS[name], workshop, seed, arm, options.out):
                    seconds = time.perf_counter() - started
                    shown = f"{name}, {arm.name}, seed {seed}: {seconds:.0f} s"
                    print(shown, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
