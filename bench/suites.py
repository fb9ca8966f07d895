"""The suites. To add one, write a module with `cases(ask)` and list it here. Imports no torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, TypeVar

from fastkd.errors import NoSuite
from fastkd.utils.similar import did_you_mean

if TYPE_CHECKING:
    from fastkd.bench.table import Table

T = TypeVar("T")


@dataclass(frozen=True)
class Suite:
    """A group of measurements. name: on the command line. module: in fastkd.bench. says: a description of one line.
    devices: those that it supports; if another one is requested, it runs on the first of these.
    named_only: runs only if its name is given."""

    name: str
    module: str
    says: str
    devices: tuple[str, ...] = ("cpu", "cuda")
    named_only: bool = False

    @property
    def title(self) -> str:
        """`says`, capitalized."""
        return self.says[:1].upper() + self.says[1:]

    def cases(self, ask: "RunConfig") -> Sequence["Case"]:
        """Its cases, in order."""
        found: Sequence[Case] = import_module(f"fastkd.bench.{self.module}").cases(ask)
        return found


@dataclass(frozen=True)
class RunConfig:
    """How to measure. full: the sizes of published figures; otherwise sizes that take a minute or two. peers: also
    measure other packages, if they are installed. rounds: of every run; None: the default of each suite."""

    device: str
    full: bool = False
    peers: bool = False
    rounds: int | None = None

    def size(self, small: T, full: T) -> T:
        """The size for a small or a full run."""
        return full if self.full else small

    def times(self, small: int, full: int) -> int:
        """The number of rounds, if `rounds` does not set it."""
        return self.rounds or self.size(small, full)


@dataclass(frozen=True)
class Case:
    """A part of a suite that is measured at once. name: for the progress. run: measures and adds rows to a table."""

    name: str
    run: Callable[["Table"], None]


_ALL = (
    Suite("loss", "bench_loss", "the loss on given logits, against one read and one write of them"),
    Suite("head", "bench_head", "the loss fused with the LM head, against its three matrix products"),
    Suite("topk", "bench_topk", "top-k, tails and draws of a teacher's logits, against one read of them"),
    Suite(
        "sass",
        "bench_sass",
        "the loss and top-k on GPUs, predicted from their compiled kernels"
        " (one size: python -m fastkd.bench.bench_sass --vocab V)",
        ("cpu",),
        named_only=True,
    ),
    Suite("cache", "bench_cache", "bytes, error, reading and writing of a cache, against plain arrays", ("cpu",)),
    Suite(
        "features",
        "bench_features",
        "hidden states against other codecs at equal error, and what they do for students",
        ("cpu",),
    ),
    Suite("formats", "bench_formats", "a cache against other formats of the same targets", ("cpu",)),
    Suite("capture", "bench_capture", "a capture against the bare teacher"),
    Suite("loader", "bench_loader", "assembled batches against plain reads, and the quality of the shuffle", ("cpu",)),
    Suite(
        "train", "bench_train", "a distillation step against a cross-entropy step, and against one with a live teacher"
    ),
    Suite("match", "bench_match", "a training step that matches features, against the same step without"),
    Suite(
        "scale", "bench_scale", "manifest and epoch order of a cache of 10^12 positions, without its shards", ("cpu",)
    ),
    Suite("plan", "bench_plan", "time and memory to plan windows for many documents", ("cpu",)),
    Suite(
        "quality",
        "bench_quality",
        "students trained on different targets of one teacher, and the error of the gradient",
        ("cpu",),
    ),
    Suite("live", "bench_live", "steps with a live teacher, with the student's average, and of two students at once"),
    Suite(
        "cluster",
        "bench_cluster",
        "many workers on one cache in an S3 that is slow and fails, some killed, some late",
        ("cpu",),
        named_only=True,
    ),
    Suite(
        "server",
        "bench_server",
        "the client of a teacher behind a server: parsing and capture",
        ("cpu",),
        named_only=True,
    ),
    Suite(
        "trl",
        "bench_trl",
        "DistillTrainer against transformers' Trainer on cross-entropy alone, and against TRL's GKD",
        named_only=True,
    ),
    Suite("cost", "bench_cost", "cost of n students from one cache, against n with a live teacher"),
)
SUITES = {suite.name: suite for suite in _ALL}


def named(names: Sequence[str]) -> list[Suite]:
    """The suites with these names, in the order of the list; without names, all that do not need to be named. Raises
    NoSuite."""
    unknown = [name for name in names if name not in SUITES]
    if unknown:
        hints = "".join(did_you_mean(name, SUITES) for name in unknown)
        raise NoSuite(f"{', '.join(unknown)}: no such suite. There are: {', '.join(SUITES)}.{hints}")
    return [suite for suite in SUITES.values() if (suite.name in names if names else not suite.named_only)]


def listing() -> str:
    """A line for each suite."""
    return "\n".join(
        f"  {suite.name:<12} {suite.says}" + "; runs only if it is named" * suite.named_only
        for suite in SUITES.values()
    )
