"""The quick pocket run by every stream: the same losses, and what each takes.

    python -m benchmarks.streams [--data sets] [--steps 100] [--work runs/streams]

`experiment=pocket_quick` on 1,800 pictures with one crop each, so that they come again after 50
steps. Teachers in the student's process, in Ray actors, and in Ray actors with a cache, which the
first 50 steps fill and the next 50 read; then the whole run once more out of the cache alone. A
thread for the student, one for each teacher: on two cores teachers on Ray have the second one.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path
from typing import Any

from benchmarks.findings.material import put_together
from benchmarks.record import write
from benchmarks.runs import Run, quick, train

WARM = 3  # steps of an epoch that are left out of its median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, default=Path("sets"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--work", type=Path, default=Path("runs/streams"))
    options = parser.parse_args()
    material = put_together(options.data, options.work / "material")
    for old in ("local", "ray", "filling", "cached", "targets"):
        shutil.rmtree(options.work / old, ignore_errors=True)
    shared = quick(material.pictures.folder.resolve(), f"stages.0.steps={options.steps}")
    cache = f"cache={options.work / 'targets'}"
    runs = {
        "local": train(options.work / "local", *shared, "stream=local"),
        "ray": train(options.work / "ray", *shared, "stream=ray"),
        "filling": train(options.work / "filling", *shared, "stream=ray", cache),
        "cached": train(options.work / "cached", *shared, "stream=local", cache),
    }
    epoch = options.steps // 2
    filling, again = epochs(runs["filling"], epoch)
    first_live, second_live = epochs(runs["ray"], epoch)
    alone = epochs(runs["local"], epoch)[1]
    cached_alone = epochs(runs["cached"], epoch)[1]
    write(
        "streams",
        {
            "what": "the quick pocket run by every stream; seconds of a step are medians",
            "steps": options.steps,
            "runs": {name: figures(run) for name, run in runs.items()},
            "same_losses": all(run.losses == runs["local"].losses for run in runs.values()),
            "same_weights": all(run.weights == runs["local"].weights for run in runs.values()),
            "second_epoch": {
                "ray": {
                    "live_seconds": second_live,
                    "cached_seconds": again,
                    "times_faster": second_live / again,
                },
                "one_process": {
                    "live_seconds": alone,
                    "cached_seconds": cached_alone,
                    "times_faster": alone / cached_alone,
                },
                "first_epoch_filling_over_live": filling / first_live,
                "cache_mb": size_of(options.work / "targets") / 1e6,
            },
        },
    )


def figures(run: Run) -> dict[str, Any]:
    """Return what a run took."""
    return {
        "wall_seconds": run.wall_seconds,
        "cpu_seconds": run.cpu_seconds,
        "step_seconds": statistics.median(run.seconds[WARM:]),
        "last_loss": sum(run.losses[-1].values()),
    }


def epochs(run: Run, steps: int) -> tuple[float, float]:
    """Return the median seconds of a step in the first epoch and in the second."""
    first, second = run.seconds[WARM:steps], run.seconds[steps + WARM :]
    return statistics.median(first), statistics.median(second)


def size_of(folder: Path) -> int:
    """Return the bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
