"""`Evaluation`: measures of a student, summed over the positions of each window; 95% intervals over the windows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import StreamError
from ..utils.atomic import unsealed
from ..utils.intervals import TAIL, Interval, bootstrap_interval, ratio_interval, to_json
from ..utils.words import KINDS, Words
from .rows import Rows
from .slices import SLICES

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

    def add_sliced(self, window: NDArray[np.int64], rows: Rows, numbers: Sequence[Tensor]) -> None:
        """Add the measures of positions to windows that are divided by slice; see `sliced`. numbers: the slices of each
        position `[m]` in each family (`slice_numbers`)."""
        names = [name for name in rows if name != "confidence"]
        # one copy from the device, and one pass over the positions for each measure
        host = torch.stack([*(rows[name].double() for name in names), *(n.double() for n in numbers)]).cpu().numpy()
        values, slices = host[: len(names)], host[len(names) :].astype(np.int64)
        first, count = int(window.min()), int(window.max()) - int(window.min()) + 1
        cells = ((window - first) * len(SLICES) + slices).ravel()
        part = slice(first * len(SLICES), (first + count) * len(SLICES))
        self.counts[part] += np.bincount(cells, minlength=count * len(SLICES))
        for name, row in zip(names, values, strict=True):
            total = self.sums.setdefault(name, np.zeros(len(self.counts)))
            total[part] += np.bincount(cells, np.tile(row, len(slices)), count * len(SLICES))

    def intervals(self) -> dict[str, Interval]:
        use = self.counts > 0
        counts = self.counts[use]
        found = {name: ratio_interval(sums[use], counts) for name, sums in self.sums.items()}
        if self.bins is not None:
            found["ece"] = bootstrap_interval(lambda times: self._ece(times, use), len(counts))
        return found

    def minus(self, other: "Windows", *, tail: float = TAIL) -> dict[str, Interval]:
        """Each measure that both have, this minus the other, paired by window. They must be of the same windows. tail:
        the share outside an interval at either end; other than 2.5%, without the calibration error."""
        use = self.counts > 0
        counts = self.counts[use]
        shared = [name for name in self.sums if name in other.sums]
        found = {name: ratio_interval((self.sums[name] - other.sums[name])[use], counts, tail=tail) for name in shared}
        if self.bins is not None and other.bins is not None and tail == TAIL:
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
        sums = {name: row.tolist() for name, row in self.sums.items()}
        return {"counts": self.counts.tolist(), "sums": sums, "bins": None if self.bins is None else self.bins.tolist()}

    def sliced(self) -> "dict[str, Windows]":
        """Of windows that are divided by slice (window w and slice s under w * len(SLICES) + s): those of each slice
        that has positions. The sums are rounded to seven digits, as they are written."""
        found = {}
        for number, name in enumerate(SLICES):
            counts = self.counts[number :: len(SLICES)]
            if counts.any():
                sums = {key: _rounded(row[number :: len(SLICES)]) for key, row in self.sums.items()}
                found[name] = Windows(counts.copy(), sums)
        return found

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


def _rounded(values: Floats) -> Floats:
    """To seven significant digits."""
    exponent = np.floor(np.log10(np.maximum(np.abs(values), 1e-15)))
    # powers of ten from 1 on are exact, and so the results are the doubles nearest to their digits
    up, down = 10.0 ** np.maximum(6.0 - exponent, 0.0), 10.0 ** np.maximum(exponent - 6.0, 0.0)
    rounded: Floats = np.round(values / down * up) / up * down
    return rounded


def _short(values: Floats) -> list[float | int]:
    """As few characters of JSON as possible: whole numbers without a point."""
    return [int(value) if value == int(value) else value for value in values.tolist()]


def _slices_from_json(data: Any, windows: int) -> dict[str, Windows]:
    found = {}
    for name, part in dict(data).items():
        counts = _finite(part["counts"], 1)
        sums = {str(key): _finite(row, 1) for key, row in dict(part["sums"]).items()}
        if any(row.shape != (windows,) for row in (counts, *sums.values())):
            raise ValueError(f"slice {name}: got other windows than those of the student")
        found[str(name)] = Windows(counts, sums)
    return found


def _finite(values: Any, dimensions: int) -> Floats:
    array = np.asarray(values, np.float64)
    if array.ndim != dimensions or not np.isfinite(array).all():
        raise ValueError(f"got numbers that are not finite, or an array that has not {dimensions} dimensions")
    return array


FORMAT = "fastkd-evaluation"
VERSION = 1
_SCALARS = dict[str, Any](
    split=str, spec=str, content=str, positions=int, seconds=float, timed_positions=int, device=str
)
# measured of every student, and known of every teacher; without a teacher, nothing is known of one
_REQUIRED = {
    "student": {"cross_entropy", "accuracy"},
    "teacher": {"label_known", "cross_entropy_at_least", "tail_mass"},
}


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The measures of a student on a split of a cache, by window.

    split, spec, content: what was evaluated on: the split, the hash of the cache's spec, a hash of the data.
    student, teacher: the sums of each window; the teacher's are of no measure if there was none. positions: that went
    through the student.
    seconds, timed_positions: of the student's forward, in this process, without the first micro-batch, which warms up
    (unless it is the only one). device: its name. slices: the student's sums over the positions of each slice, by name
    (see `slices.py`); empty for an evaluation from before there were any. kind: of the data; see `fastkd.utils.words`.
    """

    split: str
    spec: str
    content: str
    positions: int
    seconds: float
    timed_positions: int
    device: str
    student: Windows
    teacher: Windows
    slices: Mapping[str, Windows] = field(default_factory=dict)
    kind: str = "text"

    @property
    def words(self) -> Words:
        """The words for its data."""
        return KINDS[self.kind]

    @property
    def exact(self) -> bool:
        """Whether targets hold every outcome, so that what is known of the teacher is exact, and no KL is a bound."""
        sums = self.teacher.sums
        return (
            "tail_mass" in sums
            and not sums["tail_mass"].any()
            and np.array_equal(sums["label_known"], self.teacher.counts)
        )

    @property
    def count(self) -> int:
        """Positions that count."""
        return int(self.student.counts.sum())

    @property
    def windows(self) -> int:
        """Windows with positions that count."""
        return int((self.student.counts > 0).sum())

    @property
    def positions_per_second(self) -> float:
        """Of the forward alone, logits included."""
        return self.timed_positions / self.seconds if self.seconds else math.inf

    def intervals(self) -> dict[str, Interval]:
        return self.student.intervals()

    def teacher_intervals(self) -> dict[str, Interval]:
        """What the cache knows of the teacher's measures; see `measures.py`."""
        return self.teacher.intervals()

    def summary(self) -> dict[str, dict[str, Any]]:
        """The student's measures and its perplexity, each with mean, low and high, and why, if there is no interval:
        what a log keeps."""
        found = {name: to_json(value) for name, value in self.intervals().items()}
        found["perplexity"] = {
            name: math.exp(min(x, 700.0)) if isinstance(x, float) else x for name, x in found["cross_entropy"].items()
        }
        return found

    def to_json(self) -> dict[str, Any]:
        slices = {
            name: {"counts": _short(one.counts), "sums": {key: _short(row) for key, row in one.sums.items()}}
            for name, one in self.slices.items()
        }
        return {
            "format": FORMAT,
            "version": VERSION,
            **{name: getattr(self, name) for name in _SCALARS},
            "summary": self.summary(),
            "student": self.student.to_json(),
            "teacher": self.teacher.to_json(),
            **({} if self.kind == "text" else {"kind": self.kind}),
            **({"slices": slices} if slices else {}),
        }

    @classmethod
    def from_json(cls, data: Any) -> "Evaluation":
        """The evaluation in what `to_json` returned. Raises StreamError for anything else."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise StreamError("evaluation: got something else; expected what `Evaluation.to_json` returned.")
        if (version := data.get("version")) != VERSION:
            raise StreamError(f"evaluation: got version {version!r}; expected {VERSION}. Evaluate again.")
        try:
            data = unsealed(data)
            found = cls(
                **{name: kind(data[name]) for name, kind in _SCALARS.items()},
                student=(student := Windows.from_json(data["student"])),
                teacher=Windows.from_json(data["teacher"]),
                slices=_slices_from_json(data.get("slices", {}), len(student.counts)),
                kind=KINDS[data.get("kind", "text")].kind,
            )
            for name, required in _REQUIRED.items():
                sums = getattr(found, name).sums
                if (sums or name == "student") and (missing := sorted(required - sums.keys())):
                    raise ValueError(f"{name}: no {', '.join(missing)}")
            if not np.array_equal(found.student.counts, found.teacher.counts):
                raise ValueError("student and teacher have different counts")
            return found
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise StreamError(f"evaluation: damaged ({type(error).__name__}: {error}). Evaluate again.") from error
