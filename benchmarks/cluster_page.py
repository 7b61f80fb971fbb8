"""docs/cluster_figures.md out of the records: what Ray adds, saves and survives.

    python -m benchmarks.cluster_page

Needs every record; nothing is measured.
"""

from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.markdown import NONE, table, write_page
from benchmarks.record import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "cluster_figures.md"
WIDTH = 100
CODECS = ("float32", "bf16", "int8")
Record = dict[str, Any]
HEAD = """# On a cluster: figures
<!-- made by `make benchmark`; do not edit -->

What [docs/cluster.md](cluster.md) describes, measured. Every number here is of a record in
[benchmarks/results](../benchmarks/results), which the command makes again; the top of its module
says how it measures. The machine has two cores: what runs at a time takes from each other.
"""


def overlap(record: Record) -> list[str]:
    """Return what a step costs over the longer of its two sides, and the path of features."""
    mix = {
        "teachers, s": "teacher_seconds",
        "student, s": "student_seconds",
        "ours, s": "ray_seconds",
        "by hand, s": "by_hand_seconds",
        "ours / longer": "ray_over_longer",
        "by hand / longer": "by_hand_over_longer",
    }
    path = {
        "memcpy, GB/s": "memcpy_gb_s",
        "arrived, GB/s": "arrived_gb_s",
        "decoded, GB/s": "decoded_gb_s",
        "arrived / memcpy": "arrived_over_memcpy",
        "decoded / memcpy": "decoded_over_memcpy",
    }
    return [
        *prose(
            """A step with its teachers on Ray, over the longer of the teachers' and the student's
            own time. Each has a core; `by hand` is a loop of two processes and a pipe in the
            same rounds."""
        ),
        *columns("teachers : student", record["teacher_to_student"], mix, 3),
        *prose(
            """A bf16 target's way out of an actor, and on to its float32 tensor, over a memcpy of
            its bytes:"""
        ),
        *columns("MB", {str(each["megabytes"]): each for each in record["path_of_features"]}, path),
    ]


def streams(record: Record) -> list[str]:
    """Return the same run by every stream, and what a cached epoch saves."""
    titles = {
        "local": "one process",
        "ray": "Ray",
        "filling": "Ray, cache filled, then read",
        "cached": "one process, all from the cache",
    }
    run = {"wall, s": "wall_seconds", "CPU, s": "cpu_seconds", "last loss": "last_loss"}
    epoch = {
        "live, s a step": "live_seconds",
        "cached, s a step": "cached_seconds",
        "times faster": "times_faster",
    }
    second = record["second_epoch"]
    return [
        *prose(
            f"""`experiment=pocket_quick`, {record["steps"]} steps, whose pictures come again after
            half of them. Losses: {same(record["same_losses"])}. Weights:
            {same(record["same_weights"])}."""
        ),
        *columns("run", {titles[name]: said for name, said in record["runs"].items()}, run),
        *prose(
            f"""A first epoch that fills the cache takes
            {second["first_epoch_filling_over_live"]:.2f} of one that has none. It keeps
            {second["cache_mb"]:.0f} MB, out of which the second comes:"""
        ),
        *columns(
            "second epoch",
            {
                "Ray, teachers on a core of their own": second["ray"],
                "one process": second["one_process"],
            },
            epoch,
        ),
    ]


def codecs(record: Record) -> list[str]:
    """Return what codecs cost, lose, and do to a run."""
    speed = {
        "bytes a value": "bytes_a_value",
        "encode, GB/s": "encode_gb_s",
        "decode, GB/s": "decode_gb_s",
        "encode / memcpy": "encode_over_memcpy",
        "decode / memcpy": "decode_over_memcpy",
    }
    speeds = {name: dict(record["speed"][name]) for name in CODECS}
    speeds["float32"] |= {"encode_gb_s": None, "encode_over_memcpy": None}
    lossy = CODECS[1:]
    return [
        *prose(
            """Speed is that of the float32 values which are coded or decoded, on one thread, over a
            memcpy of them; to encode float32 is nothing."""
        ),
        *columns("codec", speeds, speed),
        *prose(
            """Squared error as a share of a teacher's variance: what the trained student leaves,
            what a codec adds, and the second over the first."""
        ),
        *table(
            ["teacher", "student", *lossy, *(f"{name} / student" for name in lossy)],
            [
                [
                    teacher,
                    f"{said['student']['share_of_variance']:.3f}",
                    *(f"{said[name]['share_of_variance']:.1e}" for name in lossy),
                    *(f"{said[name]['of_the_student_s']:.1e}" for name in lossy),
                ]
                for teacher, said in record["targets"].items()
            ],
        ),
        *prose("A step's targets, MB:"),
        *table(
            ["teacher", *CODECS],
            [
                [teacher, *(f"{said[name]['mb_a_step']:.2f}" for name in CODECS)]
                for teacher, said in record["targets"].items()
            ],
        ),
        *prose(
            """Held-out fidelity of the quick pocket run, the mean of its seeds, and over that by
            float32 with the same seed (the mean, the least and the most of them):"""
        ),
        *table(
            ["teacher@px", *CODECS, *(f"{name} / float32" for name in lossy)],
            [
                [
                    metric,
                    *(f"{said[name]['fidelity']:.3f}" for name in CODECS),
                    *(between(said[name]["over_float32"]) for name in lossy),
                ]
                for metric, said in record["fidelity"].items()
            ],
        ),
    ]


def chaos(record: Record) -> list[str]:
    """Return what became of a run while everything that it consists of was killed."""
    titles = {
        "teacher": "a teacher's replica is killed in a pass",
        "hang": "a teacher's replica stops in a pass for good",
        "feeder": "a feeder is killed",
        "worker": "a process of the student is killed",
        "node": "a node with four replicas is lost",
        "driver": "the driver is killed and started again",
        "store": "the object store is kept full for 10 s",
    }
    stall = {
        "later, median": "median",
        "later, most": "most",
        "stood still, median": "stood_still_median",
        "stood still, most": "stood_still_most",
    }
    found = record["stall_seconds"]
    rows = {
        f"{title}, {found[name]['faults']} times": found[name]
        for name, title in titles.items()
        if name in found
    }
    return [
        *prose(
            f"""`experiment=pocket_quick`, {record["steps"]} steps, {record["faults"]} faults at
            seeded moments: {record["batches_lost"]} batches lost, {record["batches_twice"]}
            twice. Beside the undisturbed run, losses are {same(record["losses_bit_equal"])},
            weights and optimizer {same(record["weights_bit_equal"])}. It took
            {record["disturbed_seconds"]:.0f} s instead of {record["undisturbed_seconds"]:.0f} s;
            a step takes {record["step_seconds"]:.1f} s, the longest pass of it
            {record["longest_pass_seconds"]:.1f} s, a checkpoint comes every 5 steps."""
        ),
        *prose(
            """Seconds that the run is later after a fault, and that the student stood still for its
            teachers in the steps that were recorded; a step that was lost is in the first alone.
            Both are of the time to the next fault: those close to each other share theirs."""
        ),
        *columns("fault", rows, stall, 1),
    ]


def recovery(record: Record) -> list[str]:
    """Return what a lost replica of two costs where passes leave the processor alone."""
    titles = {"undisturbed": "none", "killed": "killed in a pass", "stopped": "stopped for good"}
    found = record["stall_seconds"]
    rows = {
        f"{title}, {len(found[name]['each'])} times": found[name] for name, title in titles.items()
    }
    return [
        *prose(
            f"""Two replicas at 80 % load; a pass takes {record["pass_seconds"]:.1f} s and leaves
            the processor alone, as a GPU does. Seconds that the student stood still, from a fault
            to the next:"""
        ),
        *columns("fault", rows, {"median": "median", "most": "most"}),
    ]


def chaos_teacher(record: Record) -> list[str]:
    """Return what killed replicas cost where everything shares two cores."""
    usual = record["longest_pass_seconds"]
    stalls = {"the run is later": "stall_seconds", "the student stood still": "stood_still_seconds"}
    rows = []
    for title, key in stalls.items():
        values = [fault[key] for fault in record["each"]]
        within = sum(value <= usual + 1 for value in values)
        middle, most = statistics.median(values), max(values)
        rows.append([title, f"{middle:.1f}", f"{most:.1f}", f"{within} of {len(values)}"])
    return [
        *prose(
            f"""The quick pocket run again: four teachers with two replicas each, student, feeders
            and what loads anew share two cores. A pass takes {usual:.1f} s."""
        ),
        *table(["killed replicas", "median, s", "most, s", "within a pass and 1 s"], rows),
    ]


def memory(record: Record) -> list[str]:
    """Return what memory grows by."""
    store = record["store"]
    names = record["growth_mb_per_1000_steps"]
    growth = {"growth, MB in 1,000 steps": "growth_mb_per_1000_steps"}
    keys = {"median, MB": "median_mb", "most, MB": "most_mb"} | growth
    rows = {name: {key: record[key][name] for key in keys.values()} for name in names}
    return [
        *prose(
            f"""{record["steps"]} steps, four teachers, a feeder, the student. The object store held
            at most {store["most_mb"]:.1f} MB of {store["bound_mb"]:.0f};
            {store["spilled_mb"]:.1f} MB went to disk."""
        ),
        *columns("process", rows, keys),
        "![Own memory of every process, by step](figures/memory.svg)",
        "",
    ]


SECTIONS: dict[str, tuple[str, str, Callable[[Record], list[str]]]] = {
    "overlap": ("Teachers beside the student", "overlap", overlap),
    "streams": ("The same run by every stream", "streams --data SETS", streams),
    "codec": ("Codecs", "codec --data SETS", codecs),
    "chaos": ("Everything is killed", "chaos --data SETS", chaos),
    "recovery": ("A replica is lost", "recovery", recovery),
    "chaos_teacher": (
        "A replica is lost, on shared cores",
        "chaos --data SETS --only teacher --workers 0 --faults 12 --steps 80",
        chaos_teacher,
    ),
    "memory": ("Memory", "memory", memory),
}


def columns(
    first: str, rows: Mapping[str, Mapping[str, Any]], keys: Mapping[str, str], digits: int = 2
) -> list[str]:
    """Return a table of rows by name, whose columns are `keys` of them by title."""
    return table(
        [first, *keys],
        [
            [
                name,
                *(
                    NONE if said[key] is None else f"{said[key]:.{digits}f}"
                    for key in keys.values()
                ),
            ]
            for name, said in rows.items()
        ],
    )


def prose(text: str) -> list[str]:
    """Return a paragraph's lines and an empty one."""
    words = " ".join(text.split())
    return [*textwrap.wrap(words, WIDTH, break_long_words=False, break_on_hyphens=False), ""]


def same(equal: bool) -> str:
    """Return whether two are the same to the last bit, in words."""
    return "the same to the last bit" if equal else "**not the same**"


def between(values: list[float]) -> str:
    """Return the mean of ratios, the least and the most."""
    return f"{statistics.mean(values):.5f} ({min(values):.5f} to {max(values):.5f})"


def page() -> list[str]:
    """Return the page's lines.

    Raises:
        FileNotFoundError: a benchmark that it is made from left no record.
    """
    lines = [HEAD]
    for name, (title, command, section) in SECTIONS.items():
        record = json.loads((RESULTS / f"{name}.json").read_text())
        lines += [f"## {title}", "", f"    python -m benchmarks.{command}", "", *section(record)]
        lines += [f"Record: `{name}.json`, commit {record['commit']}.", ""]
    return lines


if __name__ == "__main__":
    write_page(PAGE, page())
