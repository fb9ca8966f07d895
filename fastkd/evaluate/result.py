"""`Evaluation`: what was measured of a student, window by window."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import StreamError
from ..utils.intervals import Interval, to_json
from .windows import Windows

FORMAT = "fastkd-evaluation"
VERSION = 1
_SCALARS: dict[str, Any] = {
    "split": str, "spec": str, "content": str, "positions": int, "seconds": float, "timed_positions": int,
    "device": str,
}  # fmt: skip
# measured of every student, and known of every teacher
_REQUIRED = {
    "student": {"cross_entropy", "accuracy"},
    "teacher": {"label_known", "cross_entropy_at_least", "tail_mass"},
}


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The measures of a student on a split of a cache, by window.

    split, spec, content: what was evaluated on: the split, the hash of the cache's spec, a hash of the data.
    student, teacher: the sums of each window. positions: that went through the student.
    seconds, timed_positions: of the student's forward, in this process, without the first micro-batch, which warms up
    (unless it is the only one). device: its name.
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
        """The student's measures; see `measures.py`."""
        return self.student.intervals()

    def teacher_intervals(self) -> dict[str, Interval]:
        """What the cache knows of the teacher's measures; see `measures.py`."""
        return self.teacher.intervals()

    def summary(self) -> dict[str, dict[str, float | None]]:
        """The student's measures and its perplexity, each with mean, low and high: what a log keeps."""
        found = {name: to_json(value) for name, value in self.intervals().items()}
        found["perplexity"] = {
            name: None if x is None else math.exp(min(x, 700.0)) for name, x in found["cross_entropy"].items()
        }
        return found

    def to_json(self) -> dict[str, Any]:
        """The evaluation in values that JSON can hold, with a summary for people who read the file."""
        return {
            "format": FORMAT,
            "version": VERSION,
            **{name: getattr(self, name) for name in _SCALARS},
            "summary": self.summary(),
            "student": self.student.to_json(),
            "teacher": self.teacher.to_json(),
        }

    @classmethod
    def from_json(cls, data: Any) -> "Evaluation":
        """The evaluation in what `to_json` returned. Raises StreamError for anything else."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise StreamError("evaluation: got something else; expected what `Evaluation.to_json` returned.")
        if data.get("version") != VERSION:
            raise StreamError(
                f"evaluation: got version {data.get('version')!r}; expected {VERSION}, which this fastkd reads. "
                "Evaluate again."
            )
        try:
            found = cls(
                **{name: kind(data[name]) for name, kind in _SCALARS.items()},
                student=Windows.from_json(data["student"]),
                teacher=Windows.from_json(data["teacher"]),
            )
            for name, required in _REQUIRED.items():
                if missing := sorted(required - getattr(found, name).sums.keys()):
                    raise ValueError(f"{name}: no {', '.join(missing)}")
            if not np.array_equal(found.student.counts, found.teacher.counts):
                raise ValueError("student and teacher have different counts")
            return found
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise StreamError(f"evaluation: damaged ({type(error).__name__}: {error}). Evaluate again.") from error
