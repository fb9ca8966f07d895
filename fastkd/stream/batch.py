"""What a student is given: micro-batches of tokens or of examples with labels and targets, and steps made of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from ..kernels import SparseTargets

LAYOUTS = ("padded", "packed")


@dataclass(frozen=True, eq=False, kw_only=True)
class AnyBatch(ABC):
    """What a `MicroBatch` and an `ExampleBatch` share."""

    labels: Tensor
    sequences: Tensor
    targets: SparseTargets
    positions: int

    @property
    def count(self) -> int:
        """Positions that count: they have a label and a target."""
        return len(self.targets)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.labels.device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The micro-batch on another device."""
        return self._map(
            lambda x: x.to(device, non_blocking=non_blocking),
            lambda t: t.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Self:
        """The micro-batch in page-locked memory, so that `to(..., non_blocking=True)` can overlap."""
        return self._map(lambda x: x.pin_memory(), lambda t: t.pin_memory())

    def tensors(self) -> list[Tensor]:
        """All its tensors."""
        own = [getattr(self, f.name) for f in fields(self)]
        return [x for x in own if isinstance(x, Tensor)] + self.targets.tensors()

    @abstractmethod
    def windows(self) -> Tensor:
        """int64 `[m]`: which of this rank's sequences of the step each position that counts is of."""

    def _index(self) -> Tensor:
        assert self.targets.index is not None
        return self.targets.index

    def _map(self, function: Callable[[Tensor], Tensor], targets: Callable[[SparseTargets], SparseTargets]) -> Self:
        changed: dict[str, Any] = {
            f.name: function(x) for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)
        }
        return replace(self, targets=targets(self.targets), **changed)


@dataclass(frozen=True, eq=False, kw_only=True)
class MicroBatch(AnyBatch):
    """Pieces of documents that one forward takes; none may see another.

    layout="padded": a row a piece, `[B, L]`, pads at the end. A causal model needs no mask, whatever it is made of.
    layout="packed": the pieces one after another, `[1, n]`. Who runs it has to keep them apart, by `cu_seqlens`,
        `position_ids` or `packing_mask()`.

    input_ids `[B, L]` int64; pads are 0.
    labels `[B, L]` int64: what the logits at each position predict, so nothing has to be shifted. −100 at a piece's
        last position, where the teacher said nothing, and at pads.
    position_ids `[B, L]` int64: places in the piece (they go on through pads).
    cu_seqlens `[P + 1]` int32: where the pieces begin and end when they lie one after another without pads.
    sequences `[P]` int32: which of this rank's sequences of the step each piece is of, from 0 on.
    max_seqlen: positions of the longest piece.
    targets: compact; `targets.index` ascends and names flattened positions of `[B, L]`: those with a label, no other.
    positions: positions without pads.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    layout: str

    def padding_mask(self) -> Tensor:
        """`[B, L]` bool: False at pads. A causal model does not need it."""
        if self.layout == "packed":
            return torch.ones_like(self.input_ids, dtype=torch.bool)
        return self.position_ids < self.cu_seqlens.diff()[:, None]

    def packing_mask(self) -> Tensor:
        """`[B, 1, L, L]` bool: who may be seen by whom, the same piece up to the same place. For attention without
        `cu_seqlens`; n² bytes."""
        causal = self.position_ids[:, :, None] >= self.position_ids[:, None, :]
        if self.layout == "padded":
            return (causal & self.padding_mask()[:, None, :])[:, None]
        piece = (self.position_ids == 0).cumsum(1)
        return (causal & (piece[:, :, None] == piece[:, None, :]))[:, None]

    def windows(self) -> Tensor:
        """int64 `[m]`: which of this rank's sequences of the step each position that counts is of."""
        if self.layout == "padded":
            piece = torch.div(self._index(), self.input_ids.shape[1], rounding_mode="floor")
        else:
            piece = torch.bucketize(self._index(), self.cu_seqlens, right=True) - 1
        return self.sequences.long()[piece]


@dataclass(frozen=True, eq=False, kw_only=True)
class ExampleBatch(AnyBatch):
    """Examples that one forward takes, each a position: as the teacher saw them, by their stored augmentation seeds.

    inputs `[B, ...]`: what `Examples.read` returns for them.
    labels `[B]` int64: the class of each; −100 where the teacher said nothing.
    sequences `[B]` int32: which of this rank's sequences of the step each is of; copies of an example are of one.
    targets: compact; `targets.index` ascends and names those with a label, no other.
    positions: B.
    """

    inputs: Tensor

    def windows(self) -> Tensor:
        """int64 `[m]`: which of this rank's sequences of the step each position that counts is of."""
        return self.sequences.long()[self._index()]


@dataclass(frozen=True, eq=False)
class Step:
    """One rank's share of an optimizer step.

    micro_batches: `MicroBatch`es, or `ExampleBatch`es from a cache of examples. Every rank has equally many, so that
        all ranks run forward and backward equally often: a rank with fewer of its own has empty ones at the end, of one
        position that does not count.
    count: positions that count in the whole step, on all ranks: the sum of losses is divided by it (`num_items`).
    positions, sequences: of the whole step, on all ranks, without padding.
    epoch, number: the epoch, and the number of the step in it, both from 0.
    """

    micro_batches: list[Any]
    count: int
    positions: int
    sequences: int
    epoch: int
    number: int

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Step":
        """The step with its micro-batches on a device."""
        return replace(self, micro_batches=[b.to(device, non_blocking=non_blocking) for b in self.micro_batches])

    def pin_memory(self) -> "Step":
        """The step with its micro-batches in page-locked memory, so that `to(..., non_blocking=True)` can overlap."""
        return replace(self, micro_batches=[b.pin_memory() for b in self.micro_batches])


def empty_micro_batch(targets: SparseTargets, device: torch.device, layout: str) -> MicroBatch:
    """A micro-batch of one position that does not count. targets: of no position, of the same cache."""
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    return MicroBatch(
        input_ids=token,
        labels=token - 100,
        position_ids=token.clone(),
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32, device=device),
        sequences=torch.zeros(1, dtype=torch.int32, device=device),
        targets=targets,
        max_seqlen=1,
        positions=0,
        layout=layout,
    )


def empty_example_batch(targets: SparseTargets, device: torch.device, example: Tensor) -> ExampleBatch:
    """The same of a cache of examples. example: one, `[1, ...]`."""
    return ExampleBatch(
        inputs=torch.zeros_like(example, device=device),
        labels=torch.full((1,), -100, dtype=torch.int64, device=device),
        sequences=torch.zeros(1, dtype=torch.int32, device=device),
        targets=targets,
        positions=0,
    )
