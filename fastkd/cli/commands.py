"""The commands, a frozen dataclass each; their docstrings are the help. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..settings import (
    CaptureSettings,
    DataSettings,
    DemoSettings,
    ModelSettings,
    TeacherSettings,
    TrainSettings,
)

Place = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CACHE")]


@dataclass(frozen=True)
class Inspect:
    """Say what a cache holds, what it costs, what is missing."""

    cache: Place
    """A folder, a .zip of one, or a URL (s3://, gs://, az://; http(s):// of a sealed cache)."""
    json: bool = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True, kw_only=True)
class Verify(ModelSettings):
    """Name each bad shard; with a teacher, run it again.

    Every shard's bytes are compared with their hashes. With a teacher: it is run on a random sample of the cache's
    batches, and compared with what is stored.
    """

    cache: Place
    """A folder, a .zip of one, or a URL (s3://, gs://, az://; http(s):// of a sealed cache)."""
    deep: bool = False
    """Decode every array as well, and compare the contents."""
    teacher: str | None = None
    """As `fastkd capture` takes it, with the same dtype and attention."""
    examples: str | None = None
    """Of a cache of examples: the module:factory that returns them."""
    positions: int = 4096
    """With a teacher: how many positions to compare, at least."""
    sample: int | None = None
    """With a teacher: the seed of the sample. Default: another each time."""
    json: bool = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True)
class Seal:
    """Write the manifest of a finished cache.

    A capture does it by itself at its end. A sealed cache opens with two requests, and takes no more shards.
    """

    cache: Place
    """A folder, or a URL (s3://, gs://, az://)."""
    json: bool = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True, kw_only=True)
class Capture(CaptureSettings, DataSettings, TeacherSettings):
    """Run a teacher once over a dataset, and keep what it says.

    The same command again goes on where it stopped.
    Exit status 0: the cache is complete. 75: work remains (after SIGTERM, or with a full disk): requeue it.
    """

    out: str
    """The cache: a folder, or a URL (s3://, gs://, az://)."""
    rank: int | None = None
    """Which of several workers this is, from 0. Default: torchrun's or SLURM's variables say so, else there is one."""
    world_size: int | None = None
    """How many workers there are. Any of them takes over what others leave undone."""
    teacher_parallel: int = 1
    """So many ranks make up one worker: for a teacher larger than one device."""
    threads: int = 1
    """Threads that encode and write."""
    json: bool = False
    """Print events, one JSON object a line, instead of a bar; the last one is the report."""


@dataclass(frozen=True, kw_only=True)
class Plan(CaptureSettings, DataSettings, TeacherSettings):
    """Say what a capture would take, from a slice of it.

    Positions, shards, requests, bytes, hours; and what other settings would take. Nothing is written.
    """

    seconds: float = 20.0
    """How long to measure, about, warm-up included; half of it goes to other settings. One batch is run at least."""
    workers: int = 1
    """How many machines like this one would share the work."""
    price_per_hour: float | None = None
    """Of one of them."""
    no_others: bool = False
    """Leave out what other k, mass and draws would cost."""
    student_rate: float = 100_000.0
    """Positions a second at which one GPU will train a student: what readers are reckoned for."""
    json: bool = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True, kw_only=True)
class Train(TrainSettings):
    """Train a student from a cache.

    The same command again goes on where it stopped; under torchrun, on all processes.
    Exit status 0: all steps are made. 75: work remains (after SIGTERM; there is a checkpoint): requeue it.
    """

    student: str
    """A folder or a name on the Hugging Face Hub of a causal model, a folder with a config.json and no weights (they
    are then new), or module:factory of your own (called without arguments, it returns a torch module)."""
    cache: str
    """A folder, a .zip of one, or a URL (s3://, gs://, az://; http(s):// of a sealed cache)."""
    data: str | None = None
    """Of a cache of examples: the module:factory that returns them, with their labels."""
    out: Path
    """The run's folder: run.json, metrics.jsonl, checkpoints, and the student as others load it."""
    control: bool = False
    """Afterwards train the same student on hard labels alone, in the same order, and set the two side by side."""
    json: bool = False
    """Print events, one JSON object a line, instead of a bar; the last one is the report."""


@dataclass(frozen=True, kw_only=True)
class Sweep(TrainSettings):
    """Train a student with several settings, and rank the results.

    The arms are the grid of all values of alpha, temperature, divergence, treatment and rate; all other settings are
    shared. The same command again resumes.
    Exit status 0: all arms are trained. 75: work remains (after SIGTERM, which writes a checkpoint): requeue it.
    """

    student: str
    """A folder or a name on the Hugging Face Hub of a causal model, a folder with a config.json and no weights (they
    are then new), or module:factory of your own (called without arguments, it returns a new torch module each time)."""
    cache: str
    """A folder, a .zip of one, or a URL (s3://, gs://, az://; http(s):// of a sealed cache)."""
    data: str | None = None
    """Of a cache of examples: the module:factory that returns them, with their labels."""
    out: Path
    """The sweep's folder: sweep.json, sweep.png, and a run's folder for each arm and seed."""
    alpha: tuple[float, ...] = ()  # type: ignore[assignment]
    """Weights of the hard labels: 0 is the teacher alone, 1 the labels alone."""
    temperature: tuple[float, ...] = ()  # type: ignore[assignment]
    """Of the soft loss; the cache says which it can serve."""
    divergence: tuple[Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "tvd"], ...] = ()  # type: ignore[assignment]
    """Of the student from the teacher."""
    treatment: tuple[Literal["auto", "bucket", "sampled", "renormalize"], ...] = ()  # type: ignore[assignment]
    """Of the teacher's mass outside the head."""
    rate: tuple[float, ...] = ()  # type: ignore[assignment]
    """The highest learning rates."""
    seeds: int = 2
    """Trainings per arm, with seeds from `--seed` on: the noise that differences are compared with."""
    at_once: int | None = None
    """Deprecated, without effect: arms are trained one after another."""
    json: bool = False
    """Print events, one JSON object a line, instead of a bar; the last one is the report."""


@dataclass(frozen=True)
class Report:
    """Set runs side by side on one page.

    Curves, the table of students, and what differs.
    """

    runs: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(required)")
    ]
    """The folders that training wrote."""
    out: Path | None = None
    """The page. Default: report.html in the first run's folder."""
    png: bool = False
    """Write each plot as a PNG beside the page as well."""
    json: bool = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True)
class Bench:
    """Measure fastkd against its limits, and its peers.

    No suite named: all of them, one after another. Exit status 1: a suite failed, or with --check something got worse.
    """

    suites: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[SUITE ...]")] = ()
    """Which; --list says what there is."""
    list: bool = False
    """Say what each suite measures, and measure nothing."""
    device: str | None = None
    """cpu or cuda. Default: a GPU where there is one."""
    peers: bool = False
    """Liger-Kernel and Cut Cross-Entropy too (pip install 'fastkd[peers]'); eager and torch.compile always are."""
    full: bool = False
    """The sizes that figures are published at: up to an hour, not minutes."""
    rounds: int | None = None
    """Of every run. Default: each suite's own."""
    runs: int = 1
    """How often each suite is measured: two are what --check knows noise from."""
    json: Path | None = None
    """Write the rows here."""
    use: tuple[Path, ...] = ()
    """Measure nothing: take the rows that --json wrote."""
    check: bool = False
    """Compare ratios and bytes with recorded ones; what seems worse is measured again."""
    against: Path | None = None
    """With --check: what to compare with. Default: the recording of this hardware that comes with fastkd."""
    page: Path | None = None
    """Write a page of HTML with plots here."""
    markdown: Path | None = None
    """Write the tables here."""


@dataclass(frozen=True)
class Demo(DemoSettings):
    """The whole on real input: a cache, students, a report.

    The students are the teacher with layers removed, healed, beside a control. The same command again goes on where it
    stopped. Exit status 0: all is there. 75: work remains (after SIGTERM or an interruption).
    """

    json: bool = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True)
class Completion:
    """Print what makes a shell complete these commands.

    bash: mkdir -p ~/.local/share/bash-completion/completions, and
    fastkd completion bash > ~/.local/share/bash-completion/completions/fastkd

    zsh: fastkd completion zsh > _fastkd, in a folder of $fpath
    """

    shell: Annotated[Literal["bash", "zsh", "fish"], tyro.conf.Positional, tyro.conf.arg(metavar="SHELL")]
    """bash, zsh or fish."""
    json: Annotated[bool, tyro.conf.Suppress] = False


COMMANDS: dict[str, type] = {
    "capture": Capture,
    "plan": Plan,
    "inspect": Inspect,
    "verify": Verify,
    "seal": Seal,
    "train": Train,
    "sweep": Sweep,
    "report": Report,
    "bench": Bench,
    "demo": Demo,
    "completion": Completion,
}
