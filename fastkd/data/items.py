"""Items of a data set of examples (of torch, torchvision, Hugging Face, or pairs in memory) as inputs and classes.

An item is an input, a pair (input, class), or a dictionary with one of `INPUTS` and perhaps one of `LABELS`. An input
is a tensor, an array, or an image of PIL, which becomes its pixels, uint8 `[C, H, W]`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset

from ..cache.errors import said, type_name
from ..errors import DataError

INPUTS = ("pixel_values", "image", "images", "img", "input", "inputs", "x")
LABELS = ("label", "labels", "target", "targets", "y", "fine_label", "class")
_MODES = ("L", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F")  # of images whose numbers are values
EXPECTED = f"an image or a tensor, alone or with its class as (x, y), or a dictionary with one of {', '.join(INPUTS)}"


class Items:
    """Examples of a data set by number. source: has `__len__`, and `__getitem__` by integers."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def item(self, number: int) -> Any:
        """What the data set returns. DataError if it fails."""
        try:
            return self._source[number]
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{where(number)}: the data set failed ({type(error).__name__}: {said(error)}).") from error

    def read(self, number: int) -> tuple[Any, int | None]:
        """An input as the data set returns it, and its class; None without one. DataError for anything else."""
        found = parts_of(item := self.item(number))
        if found is None:
            raise DataError(f"{where(number)}: got {described(item)}; expected {EXPECTED}.")
        return found[0], _class_of(found[1], number)


def where(number: int) -> str:
    """The location of an example, for messages."""
    return f"example {number} (from 0)"


def is_data_set(source: Any) -> bool:
    """Whether something is a data set of examples, by its first item: one of torch, or of Hugging Face with images, or
    a sequence of pairs, dictionaries or images.

    Raises DataError for a data set of torch that has no numbers, or whose items are neither examples nor token ids.
    """
    if isinstance(source, IterableDataset):
        raise DataError(
            f"data: got {type_name(source)}, whose items have no numbers; expected a data set with __len__ and "
            "__getitem__, of which any example can be read again."
        )
    if isinstance(source, (str, bytes, Path, Mapping, Tensor, np.ndarray)):
        return False
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__") and len(source)):
        return False
    of_tables = hasattr(source, "column_names")  # of Hugging Face, or of Arrow
    if of_tables and not (hasattr(source, "with_format") and set(INPUTS) & set(source.column_names)):
        return False
    if of_tables or isinstance(source, (TorchDataset, Sequence)):
        first = Items(source).item(0)
        if parts_of(first) is not None:
            return True
        if isinstance(source, TorchDataset):
            raise DataError(
                f"data: got {type_name(source)}, whose first item is {described(first)}; expected {EXPECTED}. Of "
                "text, give files, a Dataset of Hugging Face, or a list of token ids."
            )
    return False


def is_example(value: Any) -> bool:
    """Whether a value is an input of a classifier: an image of PIL, or a tensor or an array other than of token ids."""
    if not isinstance(value, (Tensor, np.ndarray)):
        return is_image(value)
    floating = value.is_floating_point() if isinstance(value, Tensor) else value.dtype.kind == "f"
    return value.ndim >= 2 or (value.ndim == 1 and floating)


def is_image(value: Any) -> bool:
    """Whether a value is an image of PIL, which need not be installed."""
    return any((kind.__module__, kind.__name__) == ("PIL.Image", "Image") for kind in type(value).__mro__)


def parts_of(item: Any) -> tuple[Any, Any] | None:
    """The input and the class (None without one) of an item; None if it is no example."""
    if isinstance(item, Mapping):
        inputs, labels = ([name for name in names if name in item] for names in (INPUTS, LABELS))
        if len(inputs) != 1 or len(labels) > 1:
            return None
        item = item[inputs[0]], item[labels[0]] if labels else None
    if isinstance(item, (tuple, list)):
        return (item[0], item[1]) if len(item) == 2 and is_example(item[0]) and not is_example(item[1]) else None
    return (item, None) if is_example(item) else None


def described(item: Any) -> str:
    """What an item is, for messages."""
    if isinstance(item, Mapping):
        return f"a dictionary with {', '.join(map(repr, item)) or 'nothing'}"
    if isinstance(item, (tuple, list)):
        return f"a {type(item).__name__} of {', '.join(type(part).__name__ for part in item[:4]) or 'nothing'}"
    shape = f" of shape {tuple(item.shape)}" if isinstance(item, (Tensor, np.ndarray)) else ""
    return f"{type(item).__name__}{shape}"


def tensor_of(value: Any) -> Tensor:
    """An input as a tensor on the host; of an image of PIL its pixels, uint8 `[C, H, W]`. DataError for others."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if not is_image(value):
        array = np.asarray(value, order="C")  # torch takes no negative strides, as of a flipped image
        try:
            return torch.as_tensor(array)
        except TypeError:
            raise DataError(f"got {array.dtype} as an example; expected numbers, or an image.") from None
    if value.mode not in _MODES:
        raise DataError(f"got an image of mode {value.mode!r}; expected {', '.join(_MODES)}: image.convert('RGB').")
    pixels = np.array(value)
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _class_of(label: Any, number: int) -> int | None:
    if label is None:
        return None
    array = np.asarray(label.detach().cpu() if isinstance(label, Tensor) else label)
    if array.size != 1 or array.dtype.kind not in "iu":
        got = f"{array.dtype} of shape {array.shape}" if array.ndim else f"{type(label).__name__} {label!r}"
        raise DataError(f"{where(number)}: got {got} as its class; expected an integer, numbered from 0.")
    return int(array.reshape(()))
