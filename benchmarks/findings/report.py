"""docs/findings.md out of the records: every number and every verdict is computed here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from benchmarks.findings.compare import (
    AGREES,
    DISAGREES,
    NOT_RESOLVED,
    Compared,
    arms_of,
    compare,
    mean,
    metrics_of,
    with_ranks,
)
from benchmarks.findings.declare import Finding
from benchmarks.findings.figures import save
from benchmarks.findings.records import Record, read
from benchmarks.markdown import NONE, brackets, number, table, write_page
from radio.errors import RadioError

PLURAL = {AGREES: "agree", DISAGREES: "disagree"}
MOST_COLUMNS = 10  # of a table that still fits a page
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
the paper says of the first side, `–` where it gives no direction. In figures a dot is a seed and a
stroke the mean of seeds.

- **knn**: top 1 of 100 classes by the 20 nearest neighbours of the backbone's summary, at 128 px.
- **fidelity/sam@256**: how much larger the variance of SAM's features is than the squared error of
  what the student says of them, of held-out pictures that the student sees at 256 px a side. 1 is
  no better than SAM's mean, the higher the better; 1 - 1/fidelity is the share that is explained.
- **mse/sam@256**: that error, the mean over positions and channels.
- **miou**: mean intersection over union of a linear probe of the backbone's features, CamVid at
  256 px.
"""


def write_report(findings: Mapping[str, Finding], out: Path, page: Path) -> None:
    """Write the page and its figures from the records of `out`.

    Raises:
        RadioError: no record of any finding, or records that do not belong together.
    """
    sections, summary = [], []
    for name, finding in findings.items():
        records = with_ranks(finding, read(out, name, finding))
        if not records:
            continue
        figure = Path("figures") / f"findings_{name}.svg"
        save(finding, records, page.parent / figure)
        found = [compare(each, records) for each in finding.comparisons]
        compared = [each for each in found if each is not None]
        sections += section(name, finding, records, compared, figure)
        summary.append([f"[{finding.title}](#{anchor(finding.title)})", tally(compared)])
    if not sections:
        raise RadioError(f"{out} holds no records; run: python -m benchmarks.findings")
    write_page(page, [OPENING, *table(["finding", "of its comparisons"], summary), *sections])


def section(
    name: str,
    finding: Finding,
    records: Sequence[Record],
    compared: Sequence[Compared],
    figure: Path,
) -> list[str]:
    """Return a finding's part of the page."""
    disagreeing = [each for each in compared if each.verdict == DISAGREES]
    against = [
        f"{e.comparison.first} is {'above' if e.difference > 0 else 'below'} {e.comparison.second}"
        for e in disagreeing
    ]
    return [
        f"## {finding.title}",
        "",
        f"**Paper.** {finding.claim}",
        "",
        f"**Here.** {finding.how} {provenance(records)}",
        "",
        f"**Comparisons of which the paper has a direction.** {tally(compared)}."
        + (f" It disagrees in: {'; '.join(against)}." if against else ""),
        "",
        f"![{finding.title}]({figure})",
        "",
        *(line for title in finding.tables for line in means(finding, title, records)),
        *differences(compared),
        f"`python -m benchmarks.findings {name}`",
        "",
    ]


def tally(compared: Sequence[Compared]) -> str:
    """Return how often what is measured agrees with the paper, of what it has a direction for."""
    words = Counter(each.verdict for each in compared if each.comparison.paper is not None)
    kinds = [word for word in (AGREES, DISAGREES, NOT_RESOLVED) if words[word]]
    told = (
        f"{words[word]} {word if words[word] == 1 else PLURAL.get(word, word)}" for word in kinds
    )
    return ", ".join(told) or "not measured"


def provenance(records: Sequence[Record]) -> str:
    """Say how much was trained, in which time, from which commit."""
    seeds = sorted({record.seed for record in records})
    seconds = median(record.said["seconds"]["train"] for record in records)
    images = sorted({record.said["images"] for record in records})
    commits = sorted({record.said["commit"] for record in records})
    return (
        f"Arms: {len(arms_of(records))}; seeds {', '.join(map(str, seeds))}; "
        f"{' or '.join(f'{count:,}' for count in images)} pictures a run, {seconds:.0f} s of "
        f"training in the median; commit {', '.join(commits)}."
    )


def means(finding: Finding, title: str, records: Sequence[Record]) -> list[str]:
    """Return a table of means over seeds, an arm a row; or a metric, where there are many."""
    arms, metrics = arms_of(records), metrics_of(finding.tables[title], records)
    columns = {m: [number(mean(records, arm, m)) for arm in arms] for m in metrics}
    if len(arms) > 1 and len(columns) <= MOST_COLUMNS:
        rows = zip(arms, *columns.values(), strict=True)
        return table([title, *columns], [list(row) for row in rows])
    head = arms if len(arms) > 1 else ["mean"]
    return table([title, *head], [[metric, *found] for metric, found in columns.items()])


def differences(compared: Sequence[Compared]) -> list[str]:
    """Return the table of comparisons."""
    rows = [
        [
            str(each.comparison.first),
            str(each.comparison.second),
            number(each.first),
            number(each.second),
            number(each.difference, sign="+"),
            brackets(each.seeds),
            brackets(each.pictures),
            each.comparison.paper or NONE,
            f"**{each.verdict}**",
        ]
        for each in compared
    ]
    head = ["first", "second", "value of the first", "of the second", "difference"]
    return table([*head, "over seeds", "over pictures", "paper", "verdict"], rows)


def anchor(title: str) -> str:
    """Return the fragment that a heading gets on GitHub."""
    kept = [each for each in title.lower() if each.isalnum() or each in " -"]
    return "".join(kept).replace(" ", "-")
