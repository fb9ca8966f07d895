"""Metrics of a run's steps and evaluations: metrics.jsonl, a JSON object per line.

A step: step (from 1 on), epoch, the objective's loss and parts (loss, hard, soft), rate, the objective's schedule
(alpha, ...), grad_norm (before clipping), positions, sequences, positions_per_second, seconds, waiting (fraction of
them without a batch). An evaluation: step, and "evaluation", an object of measures.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..utils.atomic import write_text
from .trackers import Tracker

FILE = "metrics.jsonl"


@dataclass(frozen=True, eq=False)
class StepMetrics:
    """The metrics of a step, some of them still on the device.

    parts: names of the objective's losses. values `[parts + 1]`: the losses, and the norm of the gradient. known:
    metrics on the host. batch: describes the step's batch in messages.
    """

    step: int
    parts: tuple[str, ...]
    values: Tensor
    known: dict[str, Any]
    batch: str

    def record(self) -> dict[str, Any]:
        """All metrics; waits until the step is over."""
        values = dict(zip((*self.parts, "grad_norm"), self.values.tolist(), strict=True))
        return {"step": self.step, **values, **self.known}


class MetricsLog:
    """The file of a run, opened after `step`: lines of later steps, which will be made again, are removed.

    tracker: is given the same entries.
    """

    def __init__(self, run: Path, step: int, tracker: Tracker | None = None) -> None:
        path = run / FILE
        kept = [line for line in read_metrics(run) if line["step"] <= step]
        write_text(path, "".join(_line(entry) for entry in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed by `close`
        self._tracker = tracker

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append a line, and flush it."""
        self._file.write(_line(entry))
        self._file.flush()
        if self._tracker is not None:
            self._tracker.write(entry)

    def close(self) -> None:
        """Close the file and the tracker."""
        self._file.close()
        if self._tracker is not None:
            self._tracker.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's metrics.jsonl; a kill may have cut off the last one."""
    path = run / FILE
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            found.append(entry)
    return found


def not_finite(record: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of these metrics that is NaN or infinite, or None."""
    return next((name for name in names if not math.isfinite(record[name])), None)


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, allow_nan=False) + "\n"
