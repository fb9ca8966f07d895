"""Trackers: TensorBoard or Weights & Biases, if installed, beside metrics.jsonl.

They get each scalar of metrics.jsonl with its step: metrics of steps as train/NAME, measures as held_out/NAME.
"""

import hashlib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ..errors import TrainError

TRACKERS = ("none", "tensorboard", "wandb")
FOLDER = "tensorboard"


class Tracker(Protocol):
    """A copy of metrics.jsonl elsewhere."""

    def write(self, entry: Mapping[str, Any]) -> None:
        """Log a line of metrics.jsonl."""

    def close(self) -> None:
        """End the log."""


def check_tracker(name: str) -> None:
    """Raise TrainError if there is no such tracker, or it is not installed."""
    if name not in TRACKERS:
        raise TrainError(f"log: got {name!r}; expected one of {', '.join(TRACKERS)}.")
    if name != "none":
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise TrainError(f"log: got {name!r}, which is not installed ({error}). pip install {name}") from error


def tracker_of(name: str, run: Path, step: int, settings: Mapping[str, Any]) -> Tracker | None:
    """The tracker of a run; None for "none". step: the last one made; entries of later steps are void. settings: of the
    training, which are logged."""
    check_tracker(name)
    if name == "tensorboard":
        return _TensorBoard(run, step)
    return _WandB(run, settings) if name == "wandb" else None


def scalars(entry: Mapping[str, Any]) -> dict[str, float]:
    """A line of metrics.jsonl as named scalars."""
    if "evaluation" in entry:
        return {f"held_out/{name}": float(value) for name, value in entry["evaluation"].items()}
    return {f"train/{name}": float(value) for name, value in entry.items() if name != "step"}


class _TensorBoard:
    def __init__(self, run: Path, step: int) -> None:
        torchs: Any = importlib.import_module("torch.utils.tensorboard")
        self._writer = torchs.SummaryWriter(log_dir=str(run / FOLDER), purge_step=step + 1)

    def write(self, entry: Mapping[str, Any]) -> None:
        for name, value in scalars(entry).items():
            self._writer.add_scalar(name, value, entry["step"])

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """A run in the same folder is the same run there. For steps that are made again, it keeps the first entries."""

    def __init__(self, run: Path, settings: Mapping[str, Any]) -> None:
        wandb: Any = importlib.import_module("wandb")
        identity = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
        # an open run of another folder is not ended
        self._run = wandb.init(
            id=identity, name=str(run), dir=str(run), config=dict(settings), resume="allow", reinit="create_new"
        )

    def write(self, entry: Mapping[str, Any]) -> None:
        self._run.log(scalars(entry), step=entry["step"])

    def close(self) -> None:
        self._run.finish()
