"""Every finding, in the order of the page."""

from __future__ import annotations

from benchmarks.findings import (
    deviations,
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
from radio.errors import RadioError

FINDINGS: dict[str, Finding] = {
    module.__name__.rpartition(".")[2]: module.FINDING
    for module in (
        tiling,
        mode_switch,
        mosaic,
        standardizers,
        deviations,
        leave_one_out,
        partitions,
        token_merging,
        layers,
    )
}


def chosen(names: list[str]) -> dict[str, Finding]:
    """Return the findings of these names, all if none is given.

    Raises:
        RadioError: an unknown name.
    """
    for name in names:
        if name not in FINDINGS:
            raise RadioError(f"unknown finding '{name}'; known: {', '.join(FINDINGS)}")
    return {name: FINDINGS[name] for name in names or FINDINGS}
