"""What a run says of its steps: metrics.jsonl, a JSON object a line, and what is shown while it goes on.

A step: step (from 1 on), epoch, loss, hard, soft, rate, alpha, temperature, grad_norm (before clipping), positions,
sequences, positions_per_second, seconds, waiting (share of them in which there was no batch). An evaluation: step, and
"evaluation", an object of measures.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..utils.atomic import write_text
from .trackers import Tracker

FILE = "metrics.jsonl"


@dataclass(frozen=True, eq=False)
class StepDone:
    """A step whose figures are still on the device. figures `[4]`: loss, hard, soft, norm of the gradient; batch: what
    it was made of, for people."""

    step: int
    figures: Tensor
    known: dict[str, Any]
    batch: str

    def record(self) -> dict[str, Any]:
        """All of it; waits for the step to be over."""
        loss, hard, soft, norm = self.figures.tolist()
        return {"step": self.step, "loss": loss, "hard": hard, "soft": soft, "grad_norm": norm} | self.known


class MetricsLog:
    """The file of a run; what was said of steps after `step`, which will be made again, is taken out of it.

    tracker: told the same.
    """

    def __init__(self, run: Path, step: int, tracker: Tracker | None = None) -> None:
        path = run / FILE
        kept = [line for line in read_metrics(run) if line["step"] <= step]
        write_text(path, "".join(_line(entry) for entry in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed by `close`
        self._tracker = tracker

    def write(self, entry: Mapping[str, Any]) -> None:
        """Add a line, for whoever reads along."""
        self._file.write(_line(entry))
        self._file.flush()
        if self._tracker is not None:
            self._tracker.write(entry)

    def close(self) -> None:
        """No more."""
        self._file.close()
        if self._tracker is not None:
            self._tracker.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.jsonl; the last one may have been cut off by a kill."""
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


def finite(record: Mapping[str, Any]) -> str | None:
    """The first of a step's figures that is not a finite number; None where all are."""
    return next((name for name in ("loss", "hard", "soft", "grad_norm") if not math.isfinite(record[name])), None)


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, allow_nan=False) + "\n"
