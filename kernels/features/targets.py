"""HiddenTargets: a teacher's hidden states as codes in an orthonormal basis."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..arguments import describe
from ..autocast import without_autocast
from ..errors import KDError, type_name
from ..fields import FLOATS, Field, TensorFields, on_device
from .basis import center, is_sink, learn_basis, moved, rms, rms_of_any, unit_rows

LARGEST_CODE = 32767
_ROWS = 256  # of float32, in a core's cache
SHARED = ("mean", "basis")
"""Fields that all targets of a feature share: they are moved to a device once."""


@dataclass(frozen=True, eq=False)
class HiddenTargets(TensorFields):
    """N hidden states (or pixels of feature maps) x of W components, coded.

    A state is x = scale · z @ basisᵀ with coordinates z = codes · step + mean @ basis. The basis is orthonormal, so
    that x / scale = z @ basisᵀ is a rotation of z: losses that do not depend on a rotation compare a student with z,
    and the states are never rotated back.

    codes `[N, W]` int16: the coordinates.
    scale `[N]` float: the root mean square of each state.
    mean `[W]` float: the mean of x / rms(x).
    basis `[W, W]` float: its columns are the components.
    exact_rows `[E]` int64, ascending: rows whose states are stored exactly (attention sinks); their codes and scale are
        not used.
    exact `[E, W]` float: these states.
    step: the distance of two codes.
    index `[N]` int64 or None: the (flattened) position of each row in its micro-batch, ascending. Without it, row i is
        position i.

    Raises KDError if shapes or types do not fit together.
    """

    codes: Tensor
    step: float
    scale: Tensor
    mean: Tensor
    basis: Tensor
    exact_rows: Tensor
    exact: Tensor
    index: Tensor | None = None

    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field("codes", torch.int16, 0, "NW"),
        Field("scale", torch.float32, 0, "N"),
        Field("exact_rows", torch.int64, 0, "E"),
        Field("exact", torch.float32, 0, "EW"),
        Field("mean", torch.float32, 0, "W"),
        Field("basis", torch.float32, 0, "WW"),
        Field("index", torch.int64, 0, "N", optional=True),
    )
    NAME: ClassVar[str] = "hidden targets"

    def __post_init__(self) -> None:
        self._check_tensors()
        for name, letters in (("codes", "rows, components"), ("exact_rows", "rows")):
            value = getattr(self, name)
            if value.ndim != letters.count(",") + 1:
                raise KDError(f"{self.NAME}.{name}: got shape {tuple(value.shape)}; expected ({letters}).")
        rows, width = self.codes.shape
        self._check_fields({"N": rows, "W": width, "E": self.exact_rows.shape[0]})
        if not isinstance(self.step, Real) or not 0 < self.step < float("inf"):
            raise KDError(f"step: got {self.step!r}; expected a positive number.")
        object.__setattr__(self, "step", float(self.step))

    def __len__(self) -> int:
        return self.codes.shape[0]

    @property
    def width(self) -> int:
        """W, the components of a state."""
        return self.codes.shape[1]

    def coordinates(self, *, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """The coordinates z `[N, W]`, of root mean square near 1 a row; of exact rows, x / rms(x) @ basis.

        out: where to write them, in place of a new tensor; dtype is then that of `out`.
        """
        dtype = dtype if out is None else out.dtype
        offset = center(self.mean, self.basis, dtype)
        z = torch.empty(self.codes.shape, dtype=dtype, device=self.device) if out is None else out
        # on a CPU in parts that stay in a core's cache; a compiler fuses the three passes itself
        rows = _ROWS if self.device.type == "cpu" and not torch.compiler.is_compiling() else max(1, len(z))
        for start in range(0, len(z), rows):
            z[start : start + rows].copy_(self.codes[start : start + rows]).mul_(self.step).add_(offset)
        if len(self.exact_rows):
            with without_autocast(self.device):
                z[self.exact_rows] = unit_rows(self.exact.to(dtype)) @ self.basis.to(dtype)
        return z

    def scales(self, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """The root mean square `[N]` of each state; of exact rows, of the exact ones."""
        scale = self.scale.to(dtype)
        if len(self.exact_rows):
            scale = scale.index_copy(0, self.exact_rows, rms_of_any(self.exact.to(dtype)))
        return scale

    def units(self, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """The states divided by their scale `[N, W]`, in the teacher's own components: z @ basisᵀ."""
        z = self.coordinates(dtype=dtype)
        with without_autocast(self.device):
            return z @ self.basis.to(dtype).T

    def states(self, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """The states x `[N, W]`; exact rows exactly."""
        states = self.units(dtype=dtype).mul_(self.scale.to(dtype)[:, None])
        if len(self.exact_rows):
            states[self.exact_rows] = self.exact.to(dtype)
        return states

    def take(self, rows: slice | Tensor) -> "HiddenTargets":
        """The targets of some rows: a slice, a boolean mask or a tensor of row numbers. `targets[rows]` is the same."""
        if not isinstance(rows, (slice, Tensor)):
            raise KDError(f"hidden targets[...]: got {type_name(rows)}; expected a slice, a mask or a tensor of rows.")
        exact_rows, exact = self.exact_rows, self.exact
        if len(exact_rows):
            number = torch.full((len(self),), -1, dtype=torch.int64, device=self.device)
            number[exact_rows] = torch.arange(len(exact_rows), device=self.device)
            taken = number[rows]
            exact_rows = (taken >= 0).nonzero().flatten()
            exact = exact[taken[exact_rows]]
        return replace(
            self,
            codes=self.codes[rows],
            scale=self.scale[rows],
            exact_rows=exact_rows,
            exact=exact,
            index=None if self.index is None else self.index[rows],
        )

    __getitem__ = take

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "HiddenTargets":
        """The targets on another device. The basis is copied there once, for all targets that share it."""
        to, shared = torch.device(device), {id(x) for x in (self.mean, self.basis)}
        return self.map(
            lambda x: moved(x, to, non_blocking) if id(x) in shared else x.to(to, non_blocking=non_blocking)
        )

    def pin_memory(self) -> "HiddenTargets":
        """The targets in page-locked memory, without the basis, which is copied once."""
        shared = {id(x) for x in (self.mean, self.basis)}
        return self.map(lambda x: x if id(x) in shared else x.pin_memory())

    @classmethod
    def cat(cls, parts: Sequence["HiddenTargets"]) -> "HiddenTargets":
        """The rows of several targets, one after another. KDError if steps, means or bases differ, or where some have
        an index and others none."""
        if not parts:
            raise KDError("cat: got no targets; expected at least one.")
        if len(parts) == 1:
            return parts[0]
        first = parts[0]
        if len(steps := {part.step for part in parts}) > 1:
            raise KDError(f"cat: got targets of different step: {', '.join(map(str, steps))}; expected one.")
        for name in SHARED:
            one = getattr(first, name)
            if not all((x := getattr(part, name)) is one or torch.equal(x, one) for part in parts):
                raise KDError(f"cat: got targets of different {name}; expected those of one feature.")
        indexes = [part.index for part in parts if part.index is not None]
        if len(indexes) not in (0, len(parts)):
            raise KDError("cat: got targets with and without an index; expected an index in all or in none.")
        starts = np.cumsum([0, *(len(part) for part in parts)]).tolist()
        shifted = [part.exact_rows + start for part, start in zip(parts, starts, strict=False)]
        return replace(
            first,
            codes=torch.cat([part.codes for part in parts]),
            scale=torch.cat([part.scale for part in parts]),
            exact_rows=torch.cat(shifted),
            exact=torch.cat([part.exact for part in parts]),
            index=torch.cat(indexes) if indexes else None,
        )

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, NDArray[Any]],
        basis: Any,
        step: float,
        *,
        index: NDArray[np.int64] | None = None,
        device: torch.device | str | None = None,
    ) -> "HiddenTargets":
        """Targets of the arrays in a feature's shard (`Feature.read_codes`): codes, scale, exact_rows and exact; other
        names are ignored.

        basis: an object with `mean` `[W]` and `basis` `[W, W]`, as tensors or arrays. Tensors that are made once and
        passed each time are copied to a device once. On the CPU (the default) the targets share the arrays' memory.
        KDError if an array is missing.
        """
        device = torch.device("cpu" if device is None else device)
        columns: dict[str, Tensor] = {}
        for name in ("codes", "scale", "exact_rows", "exact"):
            if name not in arrays:
                raise KDError(f"arrays: got no {name!r} among {', '.join(arrays)}; expected a feature shard's arrays.")
            columns[name] = on_device(arrays[name], device)
        for name in SHARED:
            value = getattr(basis, name)
            columns[name] = moved(value, device, False) if isinstance(value, Tensor) else on_device(value, device)
        return cls(**columns, step=step, index=None if index is None else on_device(index, device))

    @classmethod
    def from_states(
        cls, states: Tensor, basis: Any = None, step: float = 0.2, index: Tensor | None = None
    ) -> "HiddenTargets":
        """Code states `[N, W]`, on their device.

        basis: an object with `mean`, `basis` and maybe `scale` (the median rms; else that of the states), as tensors or
        arrays; None: the Karhunen-Loève basis of these states. Rows whose scale is more than 8 times off the median or
        no normal float16, or whose codes are beyond int16, are kept exactly. KDError for NaN or infinity.
        """
        if not isinstance(states, Tensor) or states.ndim != 2 or states.dtype not in FLOATS:
            raise KDError(f"states: got {describe(states)}; expected a floating-point tensor (rows, components).")
        if not isinstance(step, Real) or not 0 < step < float("inf"):
            raise KDError(f"step: got {step!r}; expected a positive number.")
        x = states.detach()
        x = x if x.dtype == torch.float64 else x.float()
        if not bool(torch.isfinite(x).all()):
            row = int((~torch.isfinite(x)).any(1).nonzero()[0])
            raise KDError(f"states: got NaN or infinity in row {row}; expected finite numbers.", row=row)
        found = learn_basis(x) if basis is None else basis
        mean, matrix = (torch.as_tensor(getattr(found, name), device=x.device) for name in SHARED)
        scale = rms(x)
        median = getattr(found, "scale", None)
        if median is None:
            median = float(scale.median()) if len(x) else 1.0
        rounded = scale.half().float()
        exact = is_sink(rounded, float(median))
        r = x / torch.where(exact, 1.0, rounded)[:, None]
        with without_autocast(x.device):
            codes = ((r @ matrix.to(x.dtype) - center(mean, matrix, x.dtype)) / step).round_()
        exact |= codes.abs().amax(1) > LARGEST_CODE if x.shape[1] else False
        codes[exact] = 0
        exact_rows = exact.nonzero().flatten()
        return cls(
            codes=codes.to(torch.int16),
            step=step,
            scale=torch.where(exact, 0.0, rounded),
            mean=mean,
            basis=matrix,
            exact_rows=exact_rows,
            exact=x[exact_rows].float(),
            index=index,
        )
