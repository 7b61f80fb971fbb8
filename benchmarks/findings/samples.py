"""Values of single pictures and the statistic that makes a score of them, both kept in JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from radio.evaluation.mode_switch import worst_ratio
from radio.evaluation.result import Statistic, mean
from radio.evaluation.segmentation import mean_iou

DIGITS = 7  # of a value that is kept


def fidelity(rows: NDArray[Any]) -> float:
    """Return sum (y - mean y)^2 / sum (p - y)^2 of [pictures, 2]."""
    spread, residual = rows.sum(axis=0)
    return float(spread / residual)


def explained(rows: NDArray[Any]) -> float:
    """Return e = 1 - sum (p - y)^2 / sum (y - mean y)^2 of [pictures, 2]."""
    spread, residual = rows.sum(axis=0)
    return float(1 - residual / spread)


def evenness(rows: NDArray[Any]) -> float:
    """Return min e / max e over sizes of [pictures, sizes, 2]."""
    return worst_ratio(rows[:, None])


STATISTICS: dict[str, Statistic] = {
    "mean": mean,
    "fidelity": fidelity,
    "explained": explained,
    "evenness": evenness,
    "mean_iou": mean_iou,
}


@dataclass(frozen=True)
class Samples:
    """Rows [pictures, ...] and the name of their statistic."""

    rows: NDArray[Any]
    statistic: str = "mean"

    @property
    def score(self) -> float:
        """The statistic of all rows."""
        return STATISTICS[self.statistic](self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Return what goes into JSON."""
        return {"statistic": self.statistic, "rows": _plain(self.rows)}

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Samples:
        """Read back what `as_dict` wrote."""
        return cls(np.asarray(said["rows"]), said["statistic"])


def _plain(rows: ArrayLike) -> Any:
    values = np.asarray(rows)
    if values.ndim > 1:
        return [_plain(row) for row in values]
    if np.issubdtype(values.dtype, np.integer):
        return values.tolist()
    return [float(f"{value:.{DIGITS}g}") for value in values.tolist()]
