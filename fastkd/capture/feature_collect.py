"""What becomes of a teacher's states while its batches run: codes for a shard, the states themselves for a sample."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..cache.features.spec import vector_numbers
from ..kernels import HiddenTargets, KDError
from ..utils.splitmix import mixed
from .feature_places import Place
from .feature_settings import ALL, COUNTED
from .rows import Ints, ShardRows

Array = NDArray[Any]


class Collector(Protocol):
    """Takes the states of a shard's batches, in any order.

    place: where they are. mask: bool `[n]`, the rows of the shard whose states are wanted.
    """

    @property
    def place(self) -> Place: ...

    @property
    def mask(self) -> NDArray[np.bool_]: ...

    def submit(self, vectors: Tensor) -> Any:
        """What to copy to the host, of some vectors `[m · P, W]` on the device. KDError, with `row`, for NaN."""
        ...

    def collect(self, rows: Ints, submitted: Any) -> None:
        """Keep what was submitted, now on the host. rows: of the shard, `[m]`, all in the mask."""
        ...


def stored_rows(rows: ShardRows, positions: str, seed: int) -> NDArray[np.bool_]:
    """The rows of a shard whose features are stored, bool `[n]`.

    positions: "all"; "counted": those with a target; or a fraction of these, as text: a row is chosen by a hash of the
    seed, its document and its position there, so that neither the plan nor the worker matters.
    """
    if positions == ALL:
        return np.ones(len(rows), np.bool_)
    if positions == COUNTED:
        return rows.counts
    numbers = rows.row_numbers(np.arange(len(rows))).astype(np.uint64)
    bits = mixed(mixed(np.full(1, seed, np.uint64)) ^ mixed(numbers)) >> np.uint64(11)
    chosen: NDArray[np.bool_] = rows.counts & (bits < np.uint64(round(float(positions) * 2.0**53)))
    return chosen


@dataclass(eq=False)
class Codes:
    """Codes the states of a shard's stored rows: m · P vectors.

    basis: an object with `mean`, `basis` and `scale` as tensors on the device (see `HiddenTargets.from_states`).
    """

    place: Place
    mask: NDArray[np.bool_]
    basis: Any
    step: float
    _codes: Array = field(init=False)
    _scale: Array = field(init=False)
    _exact: list[tuple[Ints, Array]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        count = int(self.mask.sum()) * self.place.vectors
        self._codes = np.zeros((count, self.place.width), np.int16)
        self._scale = np.zeros(count, np.float32)
        self._number = np.cumsum(self.mask) - 1  # of each stored row among them

    def submit(self, vectors: Tensor) -> HiddenTargets:
        return HiddenTargets.from_states(vectors, self.basis, self.step)

    def collect(self, rows: Ints, submitted: HiddenTargets) -> None:
        at = vector_numbers(self._number[rows], self.place.vectors)
        self._codes[at], self._scale[at] = submitted.codes.numpy(), submitted.scale.numpy()
        if len(submitted.exact_rows):
            self._exact.append((at[submitted.exact_rows.numpy()], submitted.exact.numpy()))

    @property
    def vectors(self) -> Ints | None:
        """The stored vectors among the shard's n · P, ascending; None if all are."""
        if self.mask.all():
            return None
        return vector_numbers(np.flatnonzero(self.mask), self.place.vectors)

    def arrays(self) -> dict[str, Array]:
        """The arrays of `FeatureWriter.write_shard`."""
        rows = np.concatenate([np.zeros(0, np.int64), *(at for at, _ in self._exact)])
        exact = np.concatenate([np.zeros((0, self.place.width), np.float32), *(states for _, states in self._exact)])
        order = np.argsort(rows)
        return {"codes": self._codes, "scale": self._scale, "exact_rows": rows[order], "exact": exact[order]}


@dataclass(eq=False)
class States:
    """Keeps the states of a sample's rows, in float32.

    of_each: of a map, vectors that are kept of a row; None: all. They are chosen by a hash of the row.
    """

    place: Place
    rows: ShardRows
    mask: NDArray[np.bool_]
    of_each: int | None = None
    found: dict[int, Array] = field(init=False, default_factory=dict)

    def submit(self, vectors: Tensor) -> Tensor:
        vectors = vectors.float()  # first: float64 may be beyond its range
        bad = ~torch.isfinite(vectors).all(1)
        if bool(bad.any()):
            raise KDError("states: got NaN or infinity", row=int(bad.nonzero()[0, 0]))
        return vectors

    def collect(self, rows: Ints, submitted: Tensor) -> None:
        each = submitted.numpy().reshape(len(rows), self.place.vectors, self.place.width)
        if self.of_each is not None and self.of_each < self.place.vectors:
            numbers = self.rows.row_numbers(rows)[:, None] + np.arange(self.of_each)
            key: NDArray[np.uint64] = numbers.astype(np.uint64)
            chosen = (mixed(mixed(key)) % np.uint64(self.place.vectors)).astype(np.int64)
            each = np.take_along_axis(each, chosen[:, :, None], 1)
        self.found.update(zip(rows.tolist(), each, strict=True))

    def vectors(self) -> Array:
        """The vectors, in the order of the rows, `[m, W]`."""
        kept = [self.found[row] for row in sorted(self.found)]
        return np.concatenate([np.zeros((0, self.place.width), np.float32), *kept])
