"""How large a student may be: "80M" parameters, or "60MB" on disk."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from ..errors import TrainError
from ..models.axes import ModelAxes, Shape
from ..models.quantization import SCHEMES, Weights, quantised_weights
from ..utils.text import size_text

_TEXT = re.compile(r"(\d+(?:\.\d+)?) ?(|k|K|M|G|T)(B?)")
_UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}
_ENTRY = 120  # bytes of a tensor in the header of a safetensors file, beside its name, at most
_SCALE = 4  # bytes of a scale


@dataclass(frozen=True)
class Budget:
    """limit: what a student's size may be at most. in_bytes: whether that is bytes on disk, or parameters. text: as it
    was given. dtype: of weights on disk. quantize: the scheme of these bytes, of `fastkd.models.quantization`."""

    limit: int
    in_bytes: bool
    text: str
    dtype: str = "float32"
    quantize: str = "none"

    def show(self, size: int) -> str:
        """A size in the budget's unit, for people."""
        return size_text(size) if self.in_bytes else f"{size:,} parameters"


def read_budget(text: str, *, dtype: str = "float32", quantize: str = "none") -> Budget:
    """The budget that "80M", "1.5G" (parameters), "60MB" or "900kB" (bytes, of 1000s) stands for.

    Raises TrainError for anything else, and for a scheme with a number of parameters, which it does not change.
    """
    found = _TEXT.fullmatch(text.strip())
    limit = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if found is None or limit < 1:
        raise TrainError(
            f"at_most: got {text!r}; expected a number of parameters, such as 80M or 1.5G, or of bytes, such as 60MB "
            "or 1.5GB."
        )
    if quantize != "none" and not found[3]:
        raise TrainError(
            f"quantize: got {quantize!r} with {text} parameters, which quantisation does not change; expected bytes, "
            "such as 60MB."
        )
    return Budget(limit, bool(found[3]), text, dtype, quantize)


class Sizes:
    """The sizes of a model's copies with other shapes: in parameters, and in bytes on disk.

    budget: whose unit, dtype and scheme `of` uses. In bytes, of safetensors files: weights and their header; with a
    scheme, codes and scales in place of the weights that are quantised.
    """

    def __init__(self, model: Any, axes: ModelAxes, budget: Budget) -> None:
        self._axes, self._budget = axes, budget
        scheme = SCHEMES.get(budget.quantize)
        self._quantised: Mapping[str, Weights] = {} if scheme is None else quantised_weights(model, scheme)

    def of(self, shape: Shape) -> int:
        """In the unit of the budget."""
        return self.bytes(shape) if self._budget.in_bytes else self._axes.parameters(shape)

    def fits(self, shape: Shape) -> bool:
        return self.of(shape) <= self._budget.limit

    def bytes(self, shape: Shape) -> int:
        item, total = _ITEM[self._budget.dtype], 8
        for name, sizes, count in self._axes.tensor_sizes(shape):
            numbers, how = prod(sizes), self._quantised.get(name)
            size = item * numbers
            if how is not None:
                scales = numbers // sizes[-1] if how.group is None else -(-numbers // how.group)
                size = -(-numbers * how.bits // 8) + _SCALE * scales
            total += count * (size + _ENTRY * (1 if how is None else 2) + len(name) + len(str(count)))
        return total
