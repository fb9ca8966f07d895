"""Single examples (images, for instance) for a classifier, each in one or more augmented copies."""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..cache.errors import type_name
from ..errors import DataError
from ..utils.progress import counting
from ..utils.splitmix import mixed

Augment = Callable[[Tensor, NDArray[np.int64]], Tensor]
"""(examples `[b, ...]`, their seeds `[b]`) to model inputs `[b, ...]`; a pure function of both."""
EXAMPLE_COLUMNS = ("example", "augmentation_seed")  # of a cache of examples
_BLOCK = 1024  # examples hashed at a time


class Examples:
    """Examples by number, and their augmentations by seed: `read(numbers, seeds)` always returns the same values.

    inputs: a tensor, an array, or a sequence of either, one entry per example, all of one shape.
    labels: the class of each example, integers `[examples]`, for the student's hard loss. A teacher needs none, so they
        are not part of the fingerprint.
    augment: augments a batch of examples, each depending only on its own seed; with fingerprint, which identifies it.
    copies: number of differently augmented copies of each example. seed: what the copies' seeds are derived from.

    The values must not be changed afterwards.
    """

    def __init__(
        self,
        inputs: Any,
        *,
        labels: Any = None,
        augment: Augment | None = None,
        fingerprint: str = "",
        copies: int = 1,
        seed: int = 0,
    ) -> None:
        if not hasattr(inputs, "__len__") or not hasattr(inputs, "__getitem__") or isinstance(inputs, (str, dict)):
            raise DataError(f"inputs: got {type_name(inputs)}; expected a tensor, an array or a sequence.")
        if (augment is None) != (not fingerprint):
            raise DataError(
                f"fingerprint: got {fingerprint!r} {'with' if augment else 'without'} augment; expected one for "
                "every augment, so that a cache is never continued with another."
            )
        for name, value, least in (("copies", copies, 1), ("seed", seed, 0)):
            if isinstance(value, bool) or not hasattr(value, "__index__") or not least <= int(value) < 2**31:
                raise DataError(f"{name}: got {value!r}; expected an integer from {least} on, below 2^31.")
        if copies > 1 and augment is None:
            raise DataError(f"copies: got {copies} without augment; all copies would be equal.")
        self.copies = int(copies)
        self._inputs, self._augment, self._seed, self._named = inputs, augment, int(seed), fingerprint
        self._labels = None if labels is None else _checked_labels(labels, len(inputs))
        self._fingerprint = ""

    def __len__(self) -> int:
        return len(self._inputs)

    def lengths(self, *, progress: bool = False, on_part: Callable[[], None] | None = None) -> NDArray[np.int32]:
        """Positions of each example, `[examples]`: its copies."""
        return np.full(len(self), self.copies, np.int32)

    def fingerprint(self, *, progress: bool = False) -> str:
        """sha256 of the examples' values and of their augmentation, computed once."""
        if self._fingerprint:
            return self._fingerprint
        whole = hashlib.sha256(json.dumps(["examples", self._named, self.copies, self._seed]).encode())
        with counting(len(self), "example", "fingerprint", shown=progress) as bar:
            for start in range(0, len(self), _BLOCK):
                block = self._stacked(range(start, min(start + _BLOCK, len(self))))
                whole.update(json.dumps([str(block.dtype), list(block.shape)]).encode())
                whole.update(block.contiguous().view(torch.uint8).numpy().data)
                bar.add(len(block))
        self._fingerprint = whole.hexdigest()
        return self._fingerprint

    @property
    def labelled(self) -> bool:
        """Whether there are labels."""
        return self._labels is not None

    @property
    def classes(self) -> int:
        """One more than the highest label; 0 without labels."""
        return 0 if self._labels is None else int(self._labels.max(initial=-1)) + 1

    def labels(self, numbers: Sequence[int] | NDArray[Any]) -> NDArray[np.int64]:
        """The classes of these examples, `[b]`. DataError if there are no labels."""
        if self._labels is None:
            raise DataError("labels: got none; expected Examples(..., labels=...) here.")
        found: NDArray[np.int64] = self._labels[np.asarray(numbers, np.int64)]
        return found

    def labels_fingerprint(self) -> str:
        """sha256 of the labels; empty without labels."""
        return "" if self._labels is None else hashlib.sha256(self._labels.astype("<i8").tobytes()).hexdigest()

    def seeds(self, example: NDArray[np.int64], copy: NDArray[np.int64]) -> NDArray[np.int64]:
        """The augmentation seed of copy number `copy` of each example, `[b]`: 63 well-mixed bits."""
        words = np.stack([np.full(len(example), self._seed, np.int64), example, copy], 1)
        state = np.zeros(len(example), np.uint64)
        for column in words.astype(np.uint64).T:
            state = mixed(state ^ column)
        return (state >> np.uint64(1)).astype(np.int64)

    def read(self, numbers: Sequence[int] | NDArray[Any], seeds: NDArray[np.int64]) -> Tensor:
        """These examples, augmented by these seeds, as model inputs `[b, ...]`."""
        examples = self._stacked(np.asarray(numbers, np.int64).tolist())
        if self._augment is None:
            return examples
        try:
            changed = self._augment(examples, np.asarray(seeds, np.int64))
        except Exception as error:
            raise DataError(f"{self.where(int(numbers[0]))} or after it: augment failed: {error!r}") from error
        if not isinstance(changed, Tensor) or len(changed) != len(examples):
            raise DataError(f"augment: got {type_name(changed)}; expected a tensor of {len(examples)} examples.")
        return changed

    def first(self) -> Tensor:
        """The first copy of the first example, `[1, ...]`; all have its shape and type."""
        first = np.zeros(1, np.int64)
        return self.read(first, self.seeds(first, first))

    def where(self, number: int) -> str:
        """The location of an example, for messages."""
        return f"example {number} (from 0)"

    def _stacked(self, numbers: Sequence[int]) -> Tensor:
        if numbers and not 0 <= min(numbers) <= max(numbers) < len(self):
            raise DataError(f"example {max(numbers)}: there are {len(self)}, numbered from 0.")
        if isinstance(self._inputs, Tensor):
            return self._inputs[torch.as_tensor(numbers)].cpu()
        if isinstance(self._inputs, np.ndarray):
            return torch.from_numpy(self._inputs[np.asarray(numbers, np.int64)])
        try:
            return torch.stack([torch.as_tensor(np.asarray(self._inputs[i])) for i in numbers])
        except (RuntimeError, TypeError, ValueError) as error:
            raise DataError(
                f"{self.where(numbers[0])} or after it: expected tensors of one shape ({error})."
            ) from error


def _checked_labels(labels: Any, examples: int) -> NDArray[np.int64]:
    array = np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)
    if array.shape != (examples,) or array.dtype.kind not in "iu":
        raise DataError(
            f"labels: got {array.dtype} of shape {array.shape}; expected integers of shape ({examples},), the "
            "class of each example."
        )
    if examples and int(array.min()) < 0:
        at = int(array.argmin())
        raise DataError(f"labels: got {int(array[at])} for example {at} (from 0); classes are numbered from 0.")
    return array.astype(np.int64)
