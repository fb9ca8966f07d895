"""Single examples (images, for instance) for a classifier, each in one or more augmented copies."""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..cache.errors import said, type_name
from ..errors import DataError
from ..utils.progress import counting
from ..utils.splitmix import mixed
from .items import Items, is_data_set, is_example, tensor_of, where
from .seeding import Seeded, SeededDataset, uses

Augment = Callable[[Tensor, NDArray[np.int64]], Tensor]
"""(examples `[b, ...]`, their seeds `[b]`) to model inputs `[b, ...]`; a pure function of both."""
EXAMPLE_COLUMNS = ("example", "augmentation_seed")  # of a cache of examples
_BLOCK = 1024  # examples hashed at a time
_REPEATED, _REPEATED_BYTES = 32, 2**26  # examples that are read twice, and their bytes, at most
_ROUNDING = 1e-4  # of the largest value


class Examples:
    """Examples by number, and their augmentations by seed: `read(numbers, seeds)` always returns the same values.

    inputs: a tensor, an array, or a sequence of either, one entry per example, all of one shape; a pair (inputs,
        classes) of arrays; or a data set of torch or Hugging Face, whose items are inputs (tensors, arrays, images of
        PIL) with their classes; see `items.py`. Images of PIL become their pixels, uint8 `[C, H, W]`.
    labels: the class of each example, integers `[examples]`, for the student's hard loss; default: those of the data
        set. A teacher needs none, so they are not part of the fingerprint.
    augment: augments a batch of examples, each depending only on its own seed; with fingerprint, which identifies it.
        Or a random transform of one example, `fastkd.data.seeded(transform)`, which gets it as the data set returns it.
    copies: number of differently augmented copies of each example. seed: what the copies' seeds are derived from.

    The values must not be changed afterwards. Some are read twice when the fingerprint is taken, and compared.
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
        if is_pair(inputs):
            inputs, labels = inputs[0], inputs[1] if labels is None else labels
        if not hasattr(inputs, "__len__") or not hasattr(inputs, "__getitem__") or isinstance(inputs, (str, dict)):
            raise DataError(f"inputs: got {type_name(inputs)}; expected a tensor, an array or a sequence.")
        if isinstance(augment, Seeded) and not fingerprint:
            fingerprint = augment.fingerprint
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
        self._items = Items(inputs) if _has_items(inputs) else None
        self._labels = None if labels is None else _checked_labels(labels, len(inputs))
        self._fingerprint = ""
        self.draws = isinstance(augment, Seeded)
        """Whether reading seeds the process's random generators: then no other thread may draw from them."""

    def __len__(self) -> int:
        return len(self._inputs)

    def lengths(self, *, progress: bool = False, on_part: Callable[[], None] | None = None) -> NDArray[np.int32]:
        """Positions of each example, `[examples]`: its copies."""
        return np.full(len(self), self.copies, np.int32)

    def fingerprint(self, *, progress: bool = False) -> str:
        """sha256 of the examples' values and of their augmentation, computed once. Of a data set, the classes are taken
        in the same pass. DataError if an example has other values when it is read again."""
        if self._fingerprint:
            return self._fingerprint
        self._check_repeated()
        kind = "examples" if self._items is None else "examples of a data set"
        whole = hashlib.sha256(json.dumps([kind, self._named, self.copies, self._seed]).encode())
        classes: list[int | None] = []
        with counting(len(self), "example", "fingerprint", shown=progress) as bar:
            for start in range(0, len(self), _BLOCK):
                numbers = range(start, min(start + _BLOCK, len(self)))
                if self._items is None:
                    _hash(whole, self._stacked(numbers))
                else:
                    classes += [self._hash_item(whole, number) for number in numbers]
                bar.add(len(numbers))
        if self._labels is None and any(label is not None for label in classes):
            if None in classes:
                raise DataError(
                    f"{where(classes.index(None))}: got no class, but others have one; expected all or none."
                )
            self._labels = _checked_labels(classes, len(self))
        self._fingerprint = whole.hexdigest()
        return self._fingerprint

    @property
    def labelled(self) -> bool:
        """Whether there are labels."""
        return self._labels is not None or (
            self._items is not None and bool(len(self)) and self._items.read(0)[1] is not None
        )

    @property
    def classes(self) -> int:
        """One more than the highest label; 0 without labels."""
        found = self._known_labels()
        return 0 if found is None else int(found.max(initial=-1)) + 1

    def labels(self, numbers: Sequence[int] | NDArray[Any]) -> NDArray[np.int64]:
        """The classes of these examples, `[b]`. DataError if there are no labels."""
        known = self._known_labels()
        if known is None:
            raise DataError("labels: got none; expected Examples(..., labels=...) here.")
        found: NDArray[np.int64] = known[np.asarray(numbers, np.int64)]
        return found

    def labels_fingerprint(self) -> str:
        """sha256 of the labels; empty without labels."""
        found = self._known_labels()
        return "" if found is None else hashlib.sha256(found.astype("<i8").tobytes()).hexdigest()

    def seeds(self, example: NDArray[np.int64], copy: NDArray[np.int64]) -> NDArray[np.int64]:
        """The augmentation seed of copy number `copy` of each example, `[b]`: 63 well-mixed bits."""
        words = np.stack([np.full(len(example), self._seed, np.int64), example, copy], 1)
        state = np.zeros(len(example), np.uint64)
        for column in words.astype(np.uint64).T:
            state = mixed(state ^ column)
        return (state >> np.uint64(1)).astype(np.int64)

    def read(self, numbers: Sequence[int] | NDArray[Any], seeds: NDArray[np.int64]) -> Tensor:
        """These examples, augmented by these seeds, as model inputs `[b, ...]`."""
        chosen, seeds = np.asarray(numbers, np.int64).tolist(), np.asarray(seeds, np.int64)
        if isinstance(self._augment, Seeded):
            return self._transformed(self._augment, chosen, seeds)
        examples = self._stacked(chosen)
        if self._augment is None:
            return examples
        try:
            changed = self._augment(examples, seeds)
        except Exception as error:
            raise DataError(f"{where(chosen[0])} or after it: augment failed: {error!r}") from error
        if not isinstance(changed, Tensor) or len(changed) != len(examples):
            raise DataError(f"augment: got {type_name(changed)}; expected a tensor of {len(examples)} examples.")
        return changed

    def first(self) -> Tensor:
        """The first copy of the first example, `[1, ...]`; all have its shape and type."""
        first = np.zeros(1, np.int64)
        return self.read(first, self.seeds(first, first))

    def where(self, number: int) -> str:
        """The location of an example, for messages."""
        return where(number)

    def _known_labels(self) -> NDArray[np.int64] | None:
        if self._labels is None and self.labelled:
            self.fingerprint()  # which takes them
        return self._labels

    def _transformed(self, transform: Seeded, numbers: list[int], seeds: NDArray[np.int64]) -> Tensor:
        """These examples, each by itself transformed with its seed."""
        found = []
        for number, seed in zip(numbers, seeds.tolist(), strict=True):
            value = self._raw(number)
            try:
                found.append((number, tensor_of(transform(value, seed))))
            except Exception as error:
                raise DataError(
                    f"{where(number)}: the transform failed ({type(error).__name__}: {said(error)})."
                ) from error
        return _stack(found)

    def _hash_item(self, whole: Any, number: int) -> int | None:
        """Add an example of a data set to a hash, and return its class."""
        assert self._items is not None
        value, label = self._items.read(number)
        _hash(whole, tensor_of(value))
        return label

    def _check_repeated(self) -> None:
        """DataError if some examples, read twice, have other values."""
        if not len(self) or (isinstance(self._inputs, (Tensor, np.ndarray)) and self._augment is None):
            return
        before, count = uses(), min(len(self), _REPEATED, max(1, _REPEATED_BYTES // max(1, self.first().nbytes)))
        numbers = np.unique(np.linspace(0, len(self) - 1, count).round().astype(np.int64))
        raw = [[tensor_of(self._raw(i)) for i in numbers.tolist()] for _ in range(2)]
        seeds = self.seeds(numbers, np.zeros_like(numbers))
        changed = [] if self._augment is None else [self.read(numbers, seeds) for _ in range(2)]
        self.draws = uses() != before
        step = "Use transform=fastkd.data.seeded(transform) in the data set, or fastkd.data.seeded(dataset)."
        again = "Make augment a function of its arguments alone, or use augment=fastkd.data.seeded(transform)."
        for readings, what, hint in ((raw, "", step), (changed, " with the same seed", again)):
            for number, *both in zip(numbers.tolist(), *readings, strict=True) if readings else ():
                if not _same(*both):
                    raise DataError(
                        f"{where(number)}: got other values when it was read again{what}, as of a random augmentation; "
                        f"expected the same, so that a student sees what the teacher saw. {hint}"
                    )

    def _raw(self, number: int) -> Any:
        """An example as it was given."""
        return self._stacked([number])[0] if self._items is None else self._items.read(number)[0]

    def _stacked(self, numbers: Sequence[int]) -> Tensor:
        if numbers and not 0 <= min(numbers) <= max(numbers) < len(self):
            raise DataError(f"example {max(numbers)}: there are {len(self)}, numbered from 0.")
        if isinstance(self._inputs, Tensor):
            return self._inputs[torch.as_tensor(numbers)].cpu()
        if isinstance(self._inputs, np.ndarray):
            return torch.from_numpy(self._inputs[np.asarray(numbers, np.int64)])
        if self._items is not None:
            return _stack([(number, tensor_of(self._items.read(number)[0])) for number in numbers])
        try:
            return torch.stack([torch.as_tensor(np.asarray(self._inputs[i])) for i in numbers])
        except (RuntimeError, TypeError, ValueError) as error:
            raise DataError(f"{where(numbers[0])} or after it: expected tensors of one shape ({error}).") from error


def as_examples(source: Any) -> Any:
    """`Examples` of what stands for some: a pair (inputs, classes), a batch of images, or a data set of torch or of
    Hugging Face with images. Anything else as it is. DataError for a data set that is neither examples nor text."""
    if isinstance(source, Examples) or source is None:
        return source
    batch = isinstance(source, (Tensor, np.ndarray)) and source.ndim > 1 and is_example(source[0] if len(source) else 0)
    return Examples(source) if batch or is_pair(source) or is_data_set(source) else source


def is_pair(source: Any) -> bool:
    """Whether something is a pair of inputs and their classes, as arrays."""
    if not isinstance(source, (tuple, list)) or len(source) != 2:
        return False
    inputs, classes = source
    if not all(isinstance(part, (Tensor, np.ndarray)) for part in source) or inputs.ndim < 2 or classes.ndim != 1:
        return False
    return len(inputs) == len(classes) and is_example(inputs[0] if len(inputs) else 0)


def _has_items(inputs: Any) -> bool:
    """Whether inputs are a data set, and not arrays."""
    if isinstance(inputs, (Tensor, np.ndarray)) or not len(inputs):
        return False
    if isinstance(inputs, SeededDataset):
        return True
    return not isinstance(inputs[0], (Tensor, np.ndarray)) and is_data_set(inputs)


def _hash(whole: Any, values: Tensor) -> None:
    whole.update(json.dumps([str(values.dtype), list(values.shape)]).encode())
    whole.update(values.contiguous().view(torch.uint8).numpy().data)


def _stack(values: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Examples, with their numbers, as a batch. DataError, naming the first one of another shape or type."""
    number, first = values[0]
    for other, value in values:
        if (value.shape, value.dtype) != (first.shape, first.dtype):
            raise DataError(
                f"{where(other)}: got {value.dtype} of shape {tuple(value.shape)}; expected {first.dtype} of shape "
                f"{tuple(first.shape)}, as of {where(number)}. Bring all to one shape with a transform, such as "
                "CenterCrop, and to one mode with image.convert('RGB')."
            )
    return torch.stack([value for _, value in values])


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two readings are the same, but for rounding in another order."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    scale = float(one.abs().nan_to_num(0.0, 0.0, 0.0).max()) if one.numel() else 0.0
    return torch.allclose(one, other, rtol=0.0, atol=_ROUNDING * scale, equal_nan=True)


def _checked_labels(labels: Any, examples: int) -> NDArray[np.int64]:
    array = np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)
    if array.shape != (examples,) or (array.dtype.kind not in "iu" and examples):
        one_hot = " Of one-hot rows, give labels.argmax(1)." if array.ndim == 2 and len(array) == examples else ""
        raise DataError(
            f"labels: got {array.dtype} of shape {array.shape}; expected integers of shape ({examples},), the "
            f"class of each example.{one_hot}"
        )
    if examples and int(array.min()) < 0:
        at = int(array.argmin())
        raise DataError(f"labels: got {int(array[at])} for example {at} (from 0); classes are numbered from 0.")
    return array.astype(np.int64)
