"""Metrics of a run's steps and evaluations: metrics.jsonl, a JSON object per line.

A step: step (from 1 on), epoch, the objective's loss and parts (loss, hard, soft), rate, the objective's schedule
(alpha, ...), grad_norm (before clipping), positions, sequences, positions_per_second, seconds, waiting (fraction of
them without a batch). An evaluation: step, and "evaluation", an object of measures. Trackers, TensorBoard or Weights &
Biases, get the same as train/NAME and held_out/NAME.
"""

import errno
import hashlib
import importlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import TrainError
from ..utils.atomic import write_text
from ..utils.secrets import masked

FILE, TENSORBOARD = "metrics.jsonl", "tensorboard"


class Tracker(NamedTuple):
    """A copy of metrics.jsonl elsewhere. log: takes named scalars and their step. close: ends the log."""

    log: Callable[[dict[str, float], int], None]
    close: Callable[[], None]


def check_tracker(name: str) -> None:
    """Raise TrainError if a tracker is not installed."""
    if name != "none":
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise TrainError(f"log: got {name!r}, which is not installed ({error}). pip install {name}") from error


def tracker_of(name: str, run: Path, step: int, settings: Mapping[str, Any]) -> Tracker | None:
    """The tracker of a run; None for "none". step: the last one made; entries of later steps are void. settings: of the
    training, which are logged."""
    if name == "tensorboard":
        torchs: Any = importlib.import_module("torch.utils.tensorboard")
        writer = torchs.SummaryWriter(log_dir=str(run / TENSORBOARD), purge_step=step + 1)

        def log(values: dict[str, float], step: int) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)

        return Tracker(log, writer.close)
    if name == "wandb":
        wandb: Any = importlib.import_module("wandb")
        # a run in the same folder is the same run there, and an open run of another folder is not ended
        identity = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
        options = {"dir": str(run), "resume": "allow", "reinit": "create_new"}
        logged = wandb.init(id=identity, name=str(run), config=masked(dict(settings)), **options)
        return Tracker(lambda values, step: logged.log(values, step=step), logged.finish)
    return None


def scalars(entry: Mapping[str, Any]) -> dict[str, float]:
    if "evaluation" in entry:
        return {f"held_out/{name}": float(value) for name, value in entry["evaluation"].items()}
    return {f"train/{name}": float(value) for name, value in entry.items() if name != "step"}


@dataclass(frozen=True, eq=False)
class StepMetrics:
    """The metrics of a step, some of them still on the device.

    parts: names of the objective's losses. norms: those of the norms of gradients. values `[parts + norms]`. known:
    metrics on the host. batch: describes the step's batch in messages.
    """

    step: int
    parts: tuple[str, ...]
    norms: tuple[str, ...]
    values: Tensor
    known: dict[str, Any]
    batch: str

    def record(self) -> dict[str, Any]:
        """All metrics; waits until the step is over."""
        values = dict(zip((*self.parts, *self.norms), self.values.tolist(), strict=True))
        return {"step": self.step, **values, **self.known}


class MetricsLog:
    """The file of a run, opened after `step`: lines of later steps, which will be made again, are removed.

    tracker: is given the same entries. mark: what `mark` returned at that step; changed: whether the file is another
    one than it was then. evaluated: whether its evaluation had been made; if not, a line of it is removed too.
    """

    def __init__(
        self, run: Path, step: int, tracker: Tracker | None = None, mark: Any = None, *, evaluated: bool = True
    ) -> None:
        self._path, self._tracker = run / FILE, tracker
        kept = [entry for entry in read_metrics(run) if entry["step"] <= step]
        if not evaluated:
            kept = [entry for entry in kept if entry["step"] < step or "evaluation" not in entry]
        text = "".join(map(_line, kept))
        self._size, self._sha256 = len(text.encode()), hashlib.sha256(text.encode())
        self.changed = mark is not None and mark != self.mark()
        write_text(self._path, text)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115  closed by `close`

    def mark(self) -> list[Any]:
        """Size and sha256 of what is written so far."""
        return [self._size, self._sha256.hexdigest()]

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append a line, and flush it. Raises OSError if that is not possible, also if the file was removed."""
        line = _line(entry)
        if not os.fstat(self._file.fileno()).st_nlink:
            raise FileNotFoundError(errno.ENOENT, "it was removed while it was written to", str(self._path))
        self._file.write(line)
        self._file.flush()
        self._size += len(line.encode())
        self._sha256.update(line.encode())
        if self._tracker is not None:
            self._tracker.log(scalars(entry), entry["step"])

    def close(self) -> None:
        with suppress(OSError):  # of a full disk, which the last `write` has raised
            self._file.close()
        if self._tracker is not None:
            self._tracker.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl that can be read; a kill may have cut off the last one."""
    path = run / FILE
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            entry = json.loads(line)
            _line(entry)  # raises ValueError for NaN and infinities
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            found.append(entry)
    return found


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, allow_nan=False) + "\n"
