"""Sums of measures over the positions of each window, and their means with 95% intervals over the windows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..utils.intervals import Interval, bootstrap_interval, ratio_interval
from .rows import Rows

Floats = NDArray[np.float64]
BINS = 15
_BIN_SUMS = ("positions", "confidence", "correct")


@dataclass(eq=False)
class Windows:
    """Sums over the positions of each window that count.

    counts `[W]`: the positions. sums: of each measure, `[W]`. bins `[W, BINS, 3]`: for each bin of confidence, the
    number of positions, the sum of their confidence, and how many are correct; None if the best token is not known.
    """

    counts: Floats
    sums: dict[str, Floats] = field(default_factory=dict)
    bins: Floats | None = None

    @classmethod
    def empty(cls, windows: int) -> "Windows":
        """Of this many windows, with no positions."""
        return cls(np.zeros(windows))

    @classmethod
    def merged(cls, parts: Sequence["Windows"]) -> "Windows":
        """The sum of several, of as many windows each."""
        names = sorted({name for part in parts for name in part.sums})
        bins = [part.bins for part in parts if part.bins is not None]
        sums = {name: np.sum([part.sums[name] for part in parts if name in part.sums], 0) for name in names}
        return cls(np.sum([part.counts for part in parts], 0), sums, np.sum(bins, 0) if bins else None)

    def add(self, window: NDArray[np.int64], rows: Rows) -> None:
        """Add the measures of positions, rows `[m]` each, to their windows `[m]`."""
        values = {name: row.double().cpu().numpy() for name, row in rows.items()}
        np.add.at(self.counts, window, 1.0)
        confidence = values.pop("confidence", None)
        for name, row in values.items():
            np.add.at(self.sums.setdefault(name, np.zeros(len(self.counts))), window, row)
        if confidence is not None:
            if self.bins is None:
                self.bins = np.zeros((len(self.counts), BINS, len(_BIN_SUMS)))
            which = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
            columns = np.stack([np.ones_like(confidence), confidence, values["accuracy"]], 1)
            np.add.at(self.bins, (window, which), columns)

    def intervals(self) -> dict[str, Interval]:
        """Each measure: the mean over all positions, with its 95% interval over the windows that have positions."""
        use = self.counts > 0
        counts = self.counts[use]
        found = {name: ratio_interval(sums[use], counts) for name, sums in self.sums.items()}
        if self.bins is not None:
            found["ece"] = bootstrap_interval(lambda times: self._ece(times, use), len(counts))
        return found

    def minus(self, other: "Windows") -> dict[str, Interval]:
        """Each measure that both have, this minus the other, paired by window. They must be of the same windows."""
        use = self.counts > 0
        counts = self.counts[use]
        shared = [name for name in self.sums if name in other.sums]
        found = {name: ratio_interval((self.sums[name] - other.sums[name])[use], counts) for name in shared}
        if self.bins is not None and other.bins is not None:
            found["ece"] = bootstrap_interval(lambda times: self._ece(times, use) - other._ece(times, use), len(counts))
        return found

    def reliability(self) -> list[dict[str, float]]:
        """The positions, mean confidence and accuracy of each bin that has positions."""
        if self.bins is None:
            return []
        return [{"positions": n, "confidence": c / n, "accuracy": a / n} for n, c, a in self.bins.sum(0).tolist() if n]

    def _ece(self, times: Floats, use: NDArray[np.bool_]) -> Floats:
        """The calibration error with each window taken `times` times, `[resamples, windows]`."""
        assert self.bins is not None
        gaps = times @ (self.bins[use, :, 2] - self.bins[use, :, 1])
        error: Floats = np.abs(gaps).sum(1) / (times @ self.counts[use])
        return error

    def to_json(self) -> dict[str, Any]:
        """In values that JSON can hold."""
        sums = {name: row.tolist() for name, row in self.sums.items()}
        return {"counts": self.counts.tolist(), "sums": sums, "bins": None if self.bins is None else self.bins.tolist()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Windows":
        """From what `to_json` returned. Raises KeyError, TypeError or ValueError for anything else."""
        counts = _finite(data["counts"], 1)
        sums = {str(name): _finite(row, 1) for name, row in dict(data["sums"]).items()}
        bins = None if data["bins"] is None else _finite(data["bins"], 3)
        if any(row.shape != counts.shape for row in sums.values()):
            raise ValueError("got measures of other windows than the counts")
        if bins is not None and bins.shape != (len(counts), BINS, len(_BIN_SUMS)):
            raise ValueError(f"got bins of shape {bins.shape}")
        if not (counts > 0).any():
            raise ValueError("got no positions")
        return cls(counts, sums, bins)


def _finite(values: Any, dimensions: int) -> Floats:
    array = np.asarray(values, np.float64)
    if array.ndim != dimensions or not np.isfinite(array).all():
        raise ValueError(f"got numbers that are not finite, or an array that has not {dimensions} dimensions")
    return array
