"""Micro-batches of tokens or of examples, with labels and targets; optimizer steps made of them; `BatchSource`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor

from ..errors import StreamError
from ..kernels import HiddenTargets, SparseTargets

LAYOUTS = ("padded", "packed")


@dataclass(frozen=True, eq=False, kw_only=True)
class AnyBatch(ABC):
    """Base class of `MicroBatch` and `ExampleBatch`."""

    labels: Tensor
    """int64: what the logits at each position predict, so they are already shifted; -100 where nothing counts. `[B, L]`
    of text, `[B]` of examples."""
    sequences: Tensor
    """int32: the number of each sequence among this rank's sequences of the step."""
    targets: SparseTargets
    """The teacher's targets of the positions that count; `targets.index` ascends and has their flattened positions."""
    positions: int
    """Positions in the micro-batch, without pads."""
    signals: Mapping[str, Any] = field(default_factory=dict)
    """What the source was asked for beside labels and targets, by names KIND/NAME such as "features/20"."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """How many there are in the whole step, in all micro-batches of all ranks: of "targets", and of each signal by its
    name. Sums over a signal are divided by its count, as those over targets are by `num_items`. Empty in a batch that
    is not of a step."""

    @property
    def count(self) -> int:
        """Positions that count: those with a label and a target."""
        return len(self.targets)

    @property
    def features(self) -> dict[str, HiddenTargets]:
        """The teacher's inner states by their names ("20", "layers.3"). The index of each holds the flattened positions
        of its vectors: of `[B, L]` for text, of `[B, P]` for the P vectors (pixels) of an example."""
        return {name.partition("/")[2]: one for name, one in self.signals.items() if name.startswith("features/")}

    def lacks(self, names: Iterable[str]) -> list[str]:
        """Those of these names of fields and signals that the micro-batch does not have."""
        return [name for name in names if name not in self.signals and not hasattr(self, name)]

    def own_counts(self) -> dict[str, int]:
        """How many targets and vectors of each signal are in this micro-batch."""
        return {"targets": self.count, **{name: len(one) for name, one in self.signals.items()}}

    @property
    def device(self) -> torch.device:
        return self.labels.device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The micro-batch in page-locked memory, so that `to(..., non_blocking=True)` can overlap."""
        return self._map(lambda x: x.pin_memory())

    def tensors(self) -> list[Tensor]:
        own = [getattr(self, f.name) for f in fields(self)]
        more = [x for signal in self.signals.values() for x in signal.tensors()]
        return [x for x in own if isinstance(x, Tensor)] + self.targets.tensors() + more

    @abstractmethod
    def windows(self) -> Tensor:
        """The sequence of each position that counts, `[m]` int64, numbered as in `sequences`."""

    def _map(self, function: Callable[[Any], Any]) -> Self:
        """The micro-batch with its tensors, targets and signals put through a function."""
        changed: dict[str, Any] = {
            f.name: function(x) for f in fields(self) if isinstance(x := getattr(self, f.name), (Tensor, SparseTargets))
        }
        return replace(self, signals={name: function(one) for name, one in self.signals.items()}, **changed)


@dataclass(frozen=True, eq=False, kw_only=True)
class MicroBatch(AnyBatch):
    """Segments of text for one forward. A segment is the part of a document in one window; none may attend to another.

    labels `[B, L]` are −100 at a segment's last position, at positions without a target, and at pads. sequences `[S]`
    has a number for each segment, and −1 for pads.
    """

    input_ids: Tensor
    """`[B, L]` int64; pads are 0."""
    position_ids: Tensor
    """`[B, L]` int64: positions in the segment (they continue through pads)."""
    cu_seqlens: Tensor
    """`[S + 1]` int32: the bounds of the segments when they lie one after another without pads."""
    max_seqlen: int
    """Positions of the longest segment."""
    layout: str
    """"padded": a row for each segment, `[B, L]`, pads at the end; a causal model needs no attention mask. "packed":
    the segments one after another, `[1, n]`; the model must keep them apart, by `cu_seqlens`, `position_ids` or
    `packing_mask()`, and pads at the end, if there are any, are segments too."""

    def padding_mask(self) -> Tensor:
        """`[B, L]` bool: False at pads. A causal model does not need it."""
        if self.layout == "packed":
            return (self.sequences >= 0).repeat_interleave(self.cu_seqlens.diff())[None]
        return self.position_ids < self.cu_seqlens.diff()[:, None]

    def packing_mask(self) -> Tensor:
        """`[B, 1, L, L]` bool: causal attention within each segment. For models without `cu_seqlens`.

        It takes L² bytes per row.
        """
        causal = self.position_ids[:, :, None] >= self.position_ids[:, None, :]
        if self.layout == "padded":
            return (causal & self.padding_mask()[:, None, :])[:, None]
        segment = (self.position_ids == 0).cumsum(1)
        return (causal & (segment[:, :, None] == segment[:, None, :]))[:, None]

    def windows(self) -> Tensor:
        """The sequence of each position that counts, `[m]` int64, numbered as in `sequences`."""
        index: Any = self.targets.index
        if self.layout == "padded":
            segment = torch.div(index, self.input_ids.shape[1], rounding_mode="floor")
        else:
            segment = torch.bucketize(index, self.cu_seqlens, right=True) - 1
        return self.sequences.long()[segment]


@dataclass(frozen=True, eq=False, kw_only=True)
class ExampleBatch(AnyBatch):
    """Examples for one forward, one position each, augmented by their stored seeds: as the teacher saw them.

    labels `[B]` are the class of each. sequences `[B]`: the copies of an example are one sequence. positions: B.
    """

    inputs: Tensor
    """`[B, ...]`: what `Examples.read` returns for them."""
    unread: tuple[Any, Any] | None = None
    """The numbers and seeds `[B]` of examples whose inputs are read when the step is handed out, on the thread of the
    caller, since they seed the process's random generators; None: they are read."""

    def windows(self) -> Tensor:
        """The sequence of each position that counts, `[m]` int64, numbered as in `sequences`."""
        index: Any = self.targets.index
        return self.sequences.long()[index]


Batch = TypeVar("Batch", bound=AnyBatch)


class MappedBatches(Sequence[Any]):
    """Micro-batches that are put through a function when they are taken, so that what their source makes of them then
    is still made late. batches: any sequence of them. function: of one."""

    def __init__(self, batches: Sequence[Any], function: Callable[[Any], Any]) -> None:
        self._batches, self._function = batches, function

    @property
    def plain(self) -> list[Any]:
        """See `Step.unanswered`."""
        return [self._function(batch) for batch in getattr(self._batches, "plain", self._batches)]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, at: Any) -> Any:
        some = self._batches[at]
        return MappedBatches(some, self._function) if isinstance(at, slice) else self._function(some)

    def __iter__(self) -> Iterator[Any]:
        return map(self._function, self._batches)


class Step:
    """One rank's share of an optimizer step.

    From a cache of examples its micro-batches are `ExampleBatch`es: `step.of(ExampleBatch)` says so to type checkers.

    It is no dataclass: Lightning takes one apart to convert its tensors, and log-probabilities are not to be rounded.
    """

    def __init__(
        self,
        micro_batches: Sequence[Any],
        count: int,
        positions: int,
        sequences: int,
        epoch: int,
        number: int,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        self.micro_batches: Sequence[MicroBatch] = micro_batches
        """Every rank has equally many, so that all ranks run forward and backward equally often: a rank with fewer of
        its own has empty ones at the end, of one position that does not count. A source may make parts of one only when
        it is taken, and again when it is taken again, with the same values."""
        self.count = count
        """Positions that count in the whole step, on all ranks: the sum of losses is divided by it (`num_items`). The
        micro-batches have it too, with those of signals (`counts`)."""
        self.positions = positions
        """Positions of the whole step, on all ranks, without padding."""
        self.sequences = sequences
        """Sequences of the whole step, on all ranks."""
        self.epoch = epoch
        """The epoch, from 0."""
        self.number = number
        """The number of the step in its epoch, from 0."""
        self.metrics: Mapping[str, float] = {} if metrics is None else metrics
        """What the source has to log of the step, by names with a "/"."""

    def __repr__(self) -> str:
        return (
            f"Step(epoch={self.epoch}, number={self.number}, micro_batches={len(self.micro_batches)}, "
            f"count={self.count}, positions={self.positions}, sequences={self.sequences})"
        )

    def of(self, kind: type[Batch]) -> Sequence[Batch]:
        """The micro-batches as those of one kind, such as `ExampleBatch`. StreamError if the first one is another."""
        batches: Any = self.micro_batches
        first = self.unanswered[:1]
        if len(first) and not isinstance(first[0], kind):
            raise StreamError(f"of: got {kind.__name__}; expected {type(first[0]).__name__}, which the step has.")
        found: Sequence[Batch] = batches
        return found

    def replace(self, **changes: Any) -> "Step":
        """The step with other values of some attributes."""
        return Step(**{**vars(self), **changes})

    @property
    def unanswered(self) -> Sequence[Any]:
        """The micro-batches as they are before the source makes more of them; `count` and inputs are the same."""
        plain: Sequence[Any] = getattr(self.micro_batches, "plain", self.micro_batches)
        return plain

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Step":
        """The step on another device: what Lightning's and accelerate's transfers call."""
        return self._map(lambda batch: batch.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Step":
        """The step with its micro-batches in page-locked memory, so that `to(..., non_blocking=True)` can overlap."""
        return self._map(lambda batch: batch.pin_memory())

    def _map(self, function: Callable[[Any], Any]) -> "Step":
        """The step with a function of each micro-batch; of those that are made when they are taken, only then."""
        batches = self.micro_batches
        if isinstance(batches, (list, tuple)):
            return self.replace(micro_batches=[function(batch) for batch in batches])
        return self.replace(micro_batches=MappedBatches(batches, function))


@runtime_checkable
class BatchSource(Protocol):
    """Optimizer steps (`Step`) in an order that can be left at any step and resumed exactly.

    A source has no base class: an object with these members is one. `CachedSource` is the one that reads a cache.
    The order of the steps may depend on what `fingerprint` names, on the epoch and on the number of the step, and on
    nothing else: not on the number of ranks, nor on how often the source was stopped.
    """

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """All that decides which steps the source yields, by name, in values that JSON can hold. Checkpoints keep it as
        it is, to compare it: a URL in it is without credentials."""

    def __len__(self) -> int:
        """Optimizer steps per epoch."""

    def steps(self) -> Iterator[Step]:
        """The steps from the current position on, epoch after epoch without end.

        The position advances as steps are handed out. Only one iterator is active: a new one ends the one before.
        Raises `Stopped` instead of waiting long for a step, if a stop was requested: on all ranks, before the same one.
        """

    def state_dict(self) -> dict[str, Any]:
        """The position, after the step handed out last, in values that JSON can hold. The same on every rank."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the position of a state. Raises StreamError if it belongs to a source with another fingerprint."""

    def seek(self, epoch: int, step: int) -> None:
        """Go to the position before a step of an epoch, both counted from 0.

        The steps that follow, and the state, are the same as if the source had been iterated to that position.
        step = the number of steps in the epoch is its end. Raises StreamError beyond that.
        """

    def close(self) -> None:
        """End the active iterator, and the threads and files behind it. `steps()` may be called again."""
