"""What a person can set, a frozen dataclass for each stage. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DemoSettings:
    """A real teacher's cache, and from it a student: the teacher with layers removed, healed; with its control."""

    out: Path = Path("demo")
    """The folder for teacher, cache and report. Where a cache of the same settings is there, it is used."""
    window: int = 512
    """Tokens a window."""
    train_windows: int = 16
    """Windows to train on."""
    held_out: int = 12
    """Windows to compare on, which no student sees."""
    shard_windows: int = 4
    """Windows a shard: what an interrupted capture may lose."""
    k: int = 48
    """Exact entries of a target."""
    draws: int = 16
    """Entries drawn from the rest."""
    cut: int = 5
    """One layer in so many is removed from the student: the middle one of each group."""
    batch_windows: int = 1
    """Windows a step."""
    steps: int = 24
    """Steps of training."""
    rate: float = 3e-4
    """Learning rate of the first step; it falls to none in a straight line."""
    alpha: float = 0.5
    """Weight of the hard labels in the student's loss. The control's is 1."""
    seed: int = 0
    """Of the split into windows, the draws, and the order of training."""
