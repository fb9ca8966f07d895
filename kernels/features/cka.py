"""Linear CKA of representations, streamed over batches (Kornblith et al. 2019)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import describe
from ..autocast import without_autocast
from ..errors import KDError


class _Shifted:
    """Columns of one representation, minus the mean of its first batch: what is far from zero loses no digits."""

    def __init__(self) -> None:
        self._shift: Tensor | None = None
        self.sum = torch.zeros(0)

    def of(self, x_ND: Tensor) -> Tensor:
        """The batch, shifted; its sum is added up."""
        if self._shift is None:
            self._shift = x_ND.mean(0)
            self.sum = torch.zeros(x_ND.shape[1], dtype=torch.float64, device=x_ND.device)
        x = x_ND - self._shift
        self.sum += x.sum(0, dtype=torch.float64)
        return x


class CKA:
    """Linear centered kernel alignment `‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖)` of columns without their mean, between 0 and 1.

    It is the same in any orthonormal basis, so coordinates serve for states divided by their scale. Products are
    added up over batches in float64: the value is that of all rows at once. It needs more rows than components: with
    few rows any two representations look alike.

        cka = CKA()
        for x_NW, y_ND in batches:  # rows of the same positions
            cka.update(x_NW, y_ND)
        cka.value()

    With several representations on each side, `update([x1, x2], [y1, y2, y3])` and `value()` a table `[2, 3]`: the
    squares of each are computed once. Memory: 8 bytes for each product of two components, of X with Y and of each
    representation with itself.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._tables: bool | None = None
        self._sides: tuple[list[_Shifted], list[_Shifted]] = ([], [])
        self._products: dict[tuple[int, int], Tensor] = {}

    @torch.no_grad()
    def update(self, x: Tensor | Sequence[Tensor], y: Tensor | Sequence[Tensor]) -> None:
        """Add a batch. x `[N, W]` and y `[N, D]`, or sequences of such. KDError if rows or widths do not fit."""
        tables = not isinstance(x, Tensor)
        groups = [[side] if isinstance(side, Tensor) else list(side) for side in (x, y)]
        self._check(groups, tables)
        if not self._sides[0]:
            self._tables = tables
            self._sides = tuple([_Shifted() for _ in group] for group in groups)  # type: ignore[assignment]
        if not (count := len(groups[0][0])):
            return
        self.rows += count
        dtype = torch.float64 if any(z.dtype == torch.float64 for group in groups for z in group) else torch.float32
        shifted = [
            side.of(z.to(dtype))
            for group, sides in zip(groups, self._sides, strict=True)
            for z, side in zip(group, sides, strict=True)
        ]
        for pair in self._pairs():
            with without_autocast(shifted[0].device):
                product = (shifted[pair[0]].T @ shifted[pair[1]]).double()
            self._products[pair] = self._products[pair].add_(product) if pair in self._products else product

    def value(self) -> float | Tensor:
        """CKA of all rows so far: a float; of sequences, a float64 tensor `[len(x), len(y)]` on the CPU. KDError before
        the first row. 0 where a representation is constant."""
        if not self.rows:
            raise KDError("CKA: got no rows; expected at least one update with some.")
        sums = [side.sum for group in self._sides for side in group]
        norms = {
            (i, j): float((product - torch.outer(sums[i], sums[j]) / self.rows).norm())
            for (i, j), product in self._products.items()
        }
        first = len(self._sides[0])
        table = torch.tensor(
            [
                [
                    norms[i, j] ** 2 / norm if (norm := norms[i, i] * norms[j, j]) else 0.0
                    for j in range(first, len(sums))
                ]
                for i in range(first)
            ],
            dtype=torch.float64,
        )
        return table if self._tables else float(table)

    def _pairs(self) -> list[tuple[int, int]]:
        first, count = len(self._sides[0]), sum(map(len, self._sides))
        return [(i, i) for i in range(count)] + [(i, j) for i in range(first) for j in range(first, count)]

    def _check(self, groups: list[list[Tensor]], tables: bool) -> None:
        for z in (z for group in groups for z in group):
            if not isinstance(z, Tensor) or z.ndim != 2 or len(z) != len(groups[0][0]):
                raise KDError(f"CKA: got {describe(z)}; expected tensors (rows, components) of as many rows each.")
        widths = [z.shape[1] for group in groups for z in group]
        known = [len(side.sum) for sides in self._sides for side in sides] if self.rows else widths
        for width, before in zip(widths, known, strict=False):
            if width != before:
                raise KDError(f"CKA: got {width} components; expected {before}, as before.")
        counts = tuple(map(len, groups))
        if not all(counts) or (self._sides[0] and (tables != self._tables or counts != tuple(map(len, self._sides)))):
            raise KDError(
                f"CKA: got {counts[0]} and {counts[1]} representations; expected as many as before, at least one."
            )
