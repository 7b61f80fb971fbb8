"""docs/findings.md out of the records: every number and every verdict is computed here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.findings.compare import (
    BySeed,
    Compared,
    arms_of,
    compare,
    mean,
    metrics_of,
    ranks,
)
from benchmarks.findings.declare import HIGHER, Finding, Table
from benchmarks.findings.figures import save
from benchmarks.findings.intervals import AGREES, DISAGREES, NOT_RESOLVED
from benchmarks.findings.records import Record, read
from radio.errors import RadioError
from radio.evaluation.result import Interval
from radio.files import write_whole

OPENING = """# Findings at pocket scale
<!-- made by `make findings`; do not edit -->

What RADIOv2.5 (2412.07679) found in its eight findings, and PHI-S (2410.01680) in its tables 1 and
3, looked at again with four small teachers and a ViT-Ti that is trained for some minutes. Models,
pictures and steps are far fewer than the papers', so a disagreement says what happens here, not
that a paper is wrong.

Every arm is trained with the same seeds; with one seed the arms of the same partitions see the same
pictures in the same order. A difference stands with two 95 % intervals: Student's t over the paired
differences of seeds, and where single pictures can be scored a paired bootstrap over them. Where
one of the two holds 0, or there is one seed only, the difference is not resolved. `paper` is what
the paper says of the first side, `-` where it gives no direction.
"""
FIGURES = "figures"  # beside the page
RANK = "mean rank"


def write_report(findings: Mapping[str, Finding], out: Path, page: Path) -> Path:
    """Write the page and its figures from the records of `out`, and return the page's path.

    Raises:
        RadioError: no record of any finding, or records that do not belong together.
    """
    known = {name: read(out, name, finding) for name, finding in findings.items()}
    known = {name: records for name, records in known.items() if records}
    if not known:
        raise RadioError(f"{out} holds no records; run: python -m benchmarks.findings")
    parts, rows = [], []
    for name, records in known.items():
        finding = findings[name]
        figure = f"{FIGURES}/findings_{name}.svg"
        save(finding.figure, records, page.parent / figure)
        arms = arms_of(records)
        found = [compare(each, arms) for each in finding.comparisons]
        compared = [each for each in found if each is not None]
        parts.append(section(name, finding, records, compared, figure))
        rows.append(f"| [{finding.title}](#{anchor(finding.title)}) | {tally(compared)} |")
    summary = ["| finding | of its comparisons |", "|---|---|", *rows]
    write_whole(page, "\n".join([OPENING, *summary, "", *parts]))
    return page


def section(
    name: str,
    finding: Finding,
    records: Sequence[Record],
    compared: Sequence[Compared],
    figure: str,
) -> str:
    """Return a finding's part of the page."""
    lines = [
        f"## {finding.title}",
        "",
        f"**Paper.** {finding.claim}",
        "",
        f"**Here.** {finding.how} {provenance(records)}",
        "",
        f"**Verdict.** {sentence(compared)}",
        "",
        f"![{finding.title}]({figure})",
        "",
    ]
    for table in finding.tables:
        lines += means(finding, table, records)
    lines += differences(compared)
    lines += [f"`python -m benchmarks.findings {name}`", ""]
    return "\n".join(lines)


def sentence(compared: Sequence[Compared]) -> str:
    """Say of the comparisons that the paper has a direction for how they came out."""
    claimed = [each for each in compared if each.comparison.paper is not None]
    if not claimed:
        return "Nothing of which the paper has a direction is measured yet."
    words = Counter(each.verdict for each in claimed)
    parts = [
        f"{what} in {words[key]} of {len(claimed)}"
        for key, what in (
            (AGREES, "agrees with the paper"),
            (DISAGREES, "disagrees with it"),
            (NOT_RESOLVED, "is not resolved"),
        )
        if words[key]
    ]
    against = [_named(each) for each in claimed if each.verdict == DISAGREES]
    said = f"What is measured here {', '.join(parts)} comparisons."
    return said + (f" It disagrees in: {'; '.join(against)}." if against else "")


def tally(compared: Sequence[Compared]) -> str:
    """Return the verdicts' numbers in a few words."""
    words = Counter(each.verdict for each in compared if each.comparison.paper is not None)
    return (
        ", ".join(f"{words[k]} {k}" for k in (AGREES, DISAGREES, NOT_RESOLVED) if words[k]) or "-"
    )


def provenance(records: Sequence[Record]) -> str:
    """Say how much was trained, in which time, from which commit."""
    seeds = sorted({record.seed for record in records})
    seconds = [record.said["seconds"]["train"] for record in records]
    images = sorted({record.said["images"] for record in records})
    commits = sorted({record.said["commit"] for record in records})
    return (
        f"Arms: {len({record.arm for record in records})}; seeds {', '.join(map(str, seeds))}; "
        f"{' or '.join(f'{count:,}' for count in images)} pictures a run, at most "
        f"{max(seconds):.0f} s of training alone; commit {', '.join(commits)}."
    )


def means(finding: Finding, table: Table, records: Sequence[Record]) -> list[str]:
    """Return a table of means over seeds, an arm a row; metrics as rows where there is one arm."""
    arms, metrics = arms_of(records), metrics_of(table.patterns, records)
    if not metrics:
        return []
    rank = ranks(finding, records) if table is finding.tables[0] else {}
    if len(arms) == 1:
        ((_, by_seed),) = arms.items()
        rows = [[metric, _number(mean(by_seed, metric))] for metric in metrics]
        return _table([table.title, "mean"], rows)
    head = [table.title, *metrics, *([RANK] if rank else [])]
    rows = [_row(arm, by_seed, metrics, rank) for arm, by_seed in arms.items()]
    return _table(head, rows)


def _row(arm: str, by_seed: BySeed, metrics: Sequence[str], rank: Mapping[str, float]) -> list[str]:
    cells = [_number(mean(by_seed, metric)) for metric in metrics]
    return [arm, *cells, *([_number(rank[arm])] if rank else [])]


def differences(compared: Sequence[Compared]) -> list[str]:
    """Return the table of comparisons."""
    rows = [
        [
            str(each.comparison.first),
            str(each.comparison.second),
            _number(each.first),
            _number(each.second),
            f"{'+' if each.difference > 0 else ''}{_number(each.difference)}",
            _interval(each.seeds),
            _interval(each.pictures),
            each.comparison.paper or "-",
            f"**{each.verdict}**",
        ]
        for each in compared
    ]
    head = ["first", "second", "first", "second", "difference"]
    return _table([*head, "over seeds", "over pictures", "paper", "verdict"], rows)


def anchor(title: str) -> str:
    """Return the fragment that a heading gets on GitHub."""
    kept = [each for each in title.lower() if each.isalnum() or each in " -"]
    return "".join(kept).replace(" ", "-")


def _named(each: Compared) -> str:
    word = "above" if each.difference > 0 else "below"
    assert (each.comparison.paper == HIGHER) == (word == "below")
    return f"{each.comparison.first} is {word} {each.comparison.second}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    lines = [head, ["---"] * len(head), *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def _interval(interval: Interval | None) -> str:
    return "-" if interval is None else f"{_number(interval[0])} to {_number(interval[1])}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if 0.1 <= abs(value) < 100 or value == 0 else f"{value:.3g}"
