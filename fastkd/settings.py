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


@dataclass(frozen=True)
class CaptureSettings:
    """What is asked of a teacher, and how its data are cut up. All of it decides what the cache holds."""

    k: int = 48
    """Exact entries of a target, at most."""
    draws: int = 16
    """Entries drawn from the rest."""
    draw_temperature: float = 1.0
    """The temperature they are drawn at: near the one that students will use."""
    mass: float | None = None
    """Cut each head once it holds so much of the probability."""
    temperatures: tuple[float, ...] = (1.0, 1.5, 2.0, 4.0)
    """Where the tail's mass is stored; 1 among them."""
    codec: str = "default"
    """How targets become bytes: fast, default, smallest or portable."""
    context: int | None = None
    """Tokens a window, at most. None: 2048, or what the teacher takes where that is less."""
    packing: str = "pack"
    """pack: documents share windows, without seeing each other. keep: each is a sequence of its own."""
    on_long: str = "split"
    """What becomes of documents longer than the context: split, truncate or error."""
    overlap: int = 0
    """With split: tokens before each further part that it sees again, without a target."""
    held_out: float | None = None
    """Fraction of the documents that students are evaluated on. None: 0.01, or 0 of a single document."""
    shard_positions: int | None = None
    """Positions a shard, at most: what a killed worker loses. None: a 64th of the data, from 2^14 to 2^20."""
    batch_tokens: int = 8192
    """Positions a batch of the teacher's, pads included, at most."""
    seed: int = 0
    """Of the draws and of the held-out split."""
