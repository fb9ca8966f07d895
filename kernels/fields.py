"""Dataclasses of tensors with one table of fields: `SparseTargets`, `HiddenTargets`, `AttentionBlock`."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .arguments import refuse_dtensor
from .errors import KDError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
INTEGER_TYPE = "an integer type (int8 to int64, or uint8: torch does not compute with wider unsigned ones)"


class Field(NamedTuple):
    """A tensor of a dataclass.

    dtype: as it is made, and as a cache returns it; any type of the same kind is accepted.
    fill: the value of an unused entry, or of a row without a target.
    shape: its dimensions, a letter each. N: rows.
    scalar: one number for all rows is accepted.
    """

    name: str
    dtype: torch.dtype
    fill: float
    shape: str
    optional: bool = False
    scalar: bool = False


class TensorFields:
    """Base class of frozen dataclasses whose tensors are listed in FIELDS. NAME is what a message calls the object."""

    FIELDS: ClassVar[tuple[Field, ...]]
    NAME: ClassVar[str]

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        first: Tensor = getattr(self, self.FIELDS[0].name)
        return first.device

    def tensors(self) -> list[Tensor]:
        """All tensors."""
        return [x for field in self.FIELDS if (x := getattr(self, field.name)) is not None]

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same with each tensor put through a function."""
        values = {field.name: getattr(self, field.name) for field in self.FIELDS}
        changed: dict[str, Any] = {name: function(v) for name, v in values.items() if v is not None}
        return replace(self, **changed)  # type: ignore[type-var]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The same on another device."""
        return self.map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same in page-locked memory, from which a copy to a device does not block."""
        return self.map(lambda x: x.pin_memory())

    def _check_tensors(self) -> None:
        """Raise KDError unless each field is a tensor, or is optional and None."""
        for field in self.FIELDS:
            value = getattr(self, field.name)
            if not isinstance(value, Tensor) and not (field.optional and value is None):
                or_else = " or None" if field.optional else " or an int" if field.scalar else ""
                raise KDError(f"{self.NAME}.{field.name}: got {value!r:.40}; expected a tensor{or_else}.")

    def _check_fields(self, sizes: Mapping[str, int]) -> None:
        """Raise KDError unless shapes, devices and types fit together. sizes: by the letters of `Field.shape`."""
        anchor = self.FIELDS[0].name
        for field in self.FIELDS:
            value = getattr(self, field.name)
            if value is None:
                continue
            name = f"{self.NAME}.{field.name}"
            refuse_dtensor(name, value)
            expected = tuple(sizes[letter] for letter in field.shape)
            if tuple(value.shape) != expected and not (field.scalar and value.ndim == 0):
                raise KDError(f"{name}: got shape {tuple(value.shape)}; expected {expected}, to fit {anchor}.")
            if value.device != self.device:
                raise KDError(f"{name}: got a tensor on {value.device}; expected it beside {anchor} on {self.device}.")
            floats = field.dtype.is_floating_point
            types, kind = (FLOATS, "a floating-point type") if floats else (INTEGERS, INTEGER_TYPE)
            if value.dtype not in types:
                raise KDError(f"{name}: got {value.dtype}; expected {kind}.")


def on_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A tensor on the device; on the CPU it shares the array's memory."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
