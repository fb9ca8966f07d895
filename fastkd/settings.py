"""What a person can set, a frozen dataclass for each stage. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


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
    codec: Literal["fast", "default", "smallest", "portable"] = "default"
    """How targets become bytes: smaller ones are slower to read; portable ones need no pcodec."""
    context: int | None = None
    """Tokens a window, at most. None: 2048, or what the teacher takes where that is less."""
    packing: Literal["pack", "keep"] = "pack"
    """pack: documents share windows, without seeing each other. keep: each is a sequence of its own."""
    on_long: Literal["split", "truncate", "error"] = "split"
    """What becomes of documents longer than the context."""
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


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """How a teacher is loaded and run."""

    revision: str | None = None
    """Of a teacher on the Hub: branch, tag or commit."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: the model's own on a GPU, float32 on a CPU."""
    attention: str | None = None
    """Which of transformers' attention implementations: eager, sdpa, flash_attention_2, ..."""
    device: str | None = None
    """cpu, cuda, cuda:1. None: this worker's GPU, or the CPU where there is none."""
    trust_remote_code: bool = False
    """Run the Python code that comes with a model."""


@dataclass(frozen=True, kw_only=True)
class TeacherSettings(ModelSettings):
    """Which teacher, and how it is run."""

    teacher: str
    """A folder or a GGUF file, a name on the Hugging Face Hub, or module:factory of your own (called without
    arguments, it returns a Teacher or a torch module)."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which data, and what makes tokens of them."""

    data: tuple[str, ...]
    """Files, folders or patterns: Parquet, Arrow, JSON lines (a document a row), plain text (a document a line). Or
    module:factory of your own (it returns Documents, Examples, a Dataset or a list)."""
    column: str | None = None
    """Which column. None: the only one, or the only one of input_ids, tokens, text, messages. Integers are taken as
    ids, text is tokenised, messages are put through the chat template first."""
    tokenizer: str | None = None
    """A folder, a GGUF file or a name. None: the teacher's own."""
    allow_other_tokenizer: bool = False
    """Take a tokenizer that is not the teacher's."""
    template: Path | None = None
    """A file with the chat template. None: the tokenizer's own."""
    loss_on: Literal["assistant", "all"] = "all"
    """Which positions of conversations count."""
