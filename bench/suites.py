"""The suites: to add one, write a module with `cases(ask)` and name it here. Imports nothing heavy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, TypeVar

from fastkd.errors import NoSuite

if TYPE_CHECKING:
    from fastkd.bench.table import Table

T = TypeVar("T")


@dataclass(frozen=True)
class Suite:
    """name: as it is asked for. module: of fastkd.bench. says: one line. devices: where it has anything to measure; on
    another device it is measured on the first of these."""

    name: str
    module: str
    says: str
    devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def title(self) -> str:
        """`says`, as a sentence begins."""
        return self.says[:1].upper() + self.says[1:]

    def cases(self, ask: "RunConfig") -> Sequence["Case"]:
        """What it measures, in order."""
        found: Sequence[Case] = import_module(f"fastkd.bench.{self.module}").cases(ask)
        return found


@dataclass(frozen=True)
class RunConfig:
    """How to measure. full: the sizes that figures are published at, else ones that take a minute or two. peers: other
    packages too, where they are installed. rounds: of every run; None: each suite's own."""

    device: str
    full: bool = False
    peers: bool = False
    rounds: int | None = None

    def size(self, small: T, full: T) -> T:
        """One of two sizes."""
        return full if self.full else small

    def times(self, small: int, full: int) -> int:
        """Rounds."""
        return self.rounds or self.size(small, full)


@dataclass(frozen=True)
class Case:
    """A part of a suite that is measured in one go: what the progress calls it, and what writes its rows."""

    name: str
    run: Callable[["Table"], None]


_ALL = (
    Suite("loss", "bench_loss", "the loss on given logits, against one read and one write of them"),
    Suite("head", "bench_head", "the loss fused with the head, against its three matrix products"),
    Suite("topk", "bench_topk", "top-k, tails and draws of a teacher's logits, against one read of them"),
    Suite("cache", "bench_cache", "bytes, error, reading and writing of a cache, against plain arrays", ("cpu",)),
    Suite("formats", "bench_formats", "a cache against other formats of the same targets", ("cpu",)),
    Suite("capture", "bench_capture", "a capture against the bare teacher"),
    Suite("loader", "bench_loader", "ready batches against plain reads, and how well they are shuffled", ("cpu",)),
    Suite("train", "bench_train", "a step of distillation against one of cross-entropy, and with the teacher live"),
    Suite("scale", "bench_scale", "a cache of 10^12 positions, of records alone: manifest and order", ("cpu",)),
    Suite("plan", "bench_plan", "planning many documents: seconds and memory", ("cpu",)),
    Suite(
        "quality", "bench_quality", "students of one teacher by what they are trained on, and its gradient", ("cpu",)
    ),
    Suite("cost", "bench_cost", "n students from one cache, against n with the teacher live"),
)
SUITES = {suite.name: suite for suite in _ALL}


def named(names: Sequence[str]) -> list[Suite]:
    """The suites of these names, in the registry's order; all of them where none is named. Raises NoSuite."""
    unknown = [name for name in names if name not in SUITES]
    if unknown:
        raise NoSuite(f"{', '.join(unknown)}: no such suite. There are: {', '.join(SUITES)}.")
    return [suite for suite in SUITES.values() if not names or suite.name in names]


def listing() -> str:
    """A line a suite."""
    return "\n".join(f"  {suite.name:<12} {suite.says}" for suite in SUITES.values())
