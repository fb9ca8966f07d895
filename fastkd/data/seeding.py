"""`seeded`: random transforms, such as torchvision's, that give the same result for an example whenever it is read.

A cache stores what a teacher said of certain pixels, and a student has to see those pixels again.
"""

import hashlib
import random
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..cache.errors import type_name
from ..errors import DataError
from ..utils.splitmix import mixed
from .items import tensor_of

_generators = threading.RLock()  # they are the process's
_uses = 0
_ADDRESS = re.compile(r"\bat 0x[0-9a-f]+")


def seeded(transform: Any, *, seed: int = 0, fingerprint: str = "") -> "Seeded | SeededDataset":
    """A random transform that depends only on the example.

    transform: a callable of one example (an image of PIL, a tensor, an array) that takes its random numbers from the
        global generators of torch, NumPy or Python. They are seeded for each call, and restored after it. Or a data set
        with such transforms inside it: each item is then read with generators that are seeded by its index.
    seed: another one gives other results. fingerprint: identifies the transform; default: its repr, if that says it.

    Called with an example and its index, the result depends on both; without an index, on the example's values. So it
    can take the place of the transform in a data set, also in the workers of a DataLoader. As `augment` of `Examples`
    it is called with the seed of each example and copy, and gets examples as the data set returns them:

        CIFAR10(root, transform=seeded(Compose([RandomCrop(32, 4), ToTensor()])))
        Examples(ImageFolder(root), augment=seeded(Compose([RandomResizedCrop(224), ToTensor()])), copies=4)

    Raises DataError for what is neither.
    """
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or not 0 <= int(seed) < 2**63:
        raise DataError(f"seed: got {seed!r}; expected an integer from 0 on, below 2^63.")
    if callable(transform):
        return Seeded(transform, int(seed), fingerprint)
    if hasattr(transform, "__len__") and hasattr(transform, "__getitem__"):
        return SeededDataset(transform, int(seed))
    raise DataError(f"seeded: got {type_name(transform)}; expected a transform, which is called, or a data set.")


class Seeded:
    """A transform with seeded generators; made by `seeded`. Can be pickled if the transform can."""

    def __init__(self, transform: Any, seed: int, fingerprint: str) -> None:
        self.transform, self.seed, self._named = transform, seed, fingerprint

    def __call__(self, example: Any, index: Any = None) -> Any:
        """The transform of an example. index: its number, or any integer below 2^64 in its place; None: a hash of its
        values. With an array of them `[b]`, of a batch of examples: the results, stacked."""
        if index is not None and np.ndim(index):
            return torch.stack([tensor_of(self(one, i)) for one, i in zip(example, np.asarray(index), strict=True)])
        with generators_from(self.seed, _number_of(example) if index is None else int(index)):
            return self.transform(example)

    @property
    def fingerprint(self) -> str:
        """Identifies transform and seed. DataError if the transform's repr does not say what it does."""
        said = self._named or repr(self.transform)
        if _ADDRESS.search(said):
            name = getattr(self.transform, "__qualname__", type(self.transform).__name__)
            raise DataError(
                f"fingerprint: got none for {name}, whose repr does not say what it does. Give "
                "seeded(..., fingerprint=...), a text that changes whenever its results do."
            )
        return f"seeded by {self.seed}: {said}"

    def __repr__(self) -> str:
        return f"seeded({self.transform!r}, seed={self.seed})"


class SeededDataset(Dataset[Any]):
    """A data set, each item of which is read with generators that are seeded by its index; made by `seeded`."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        with generators_from(self.seed, int(index)):
            return self.dataset[index]


@contextmanager
def generators_from(seed: int, number: int) -> Iterator[None]:
    """The global generators of torch (on the CPU), NumPy and Python, seeded by both; restored after it. No other thread
    may draw from them meanwhile."""
    key = mixed(mixed(np.array([seed % 2**64], np.uint64)) ^ np.array([number % 2**64], np.uint64))
    word = int(key[0])
    global _uses
    with _generators:
        _uses += 1
        before = torch.get_rng_state(), np.random.get_state(), random.getstate()
        try:
            torch.default_generator.manual_seed(word % 2**63)
            np.random.seed([word & 0xFFFFFFFF, word >> 32])
            random.seed(word)
            yield
        finally:
            torch.set_rng_state(before[0])
            np.random.set_state(before[1])
            random.setstate(before[2])


def uses() -> int:
    """How often the generators were seeded in this process."""
    return _uses


def _number_of(example: Any) -> int:
    """63 bits from an example's values."""
    value: Tensor = tensor_of(example)
    digest = hashlib.blake2b(f"{value.dtype}{tuple(value.shape)}".encode(), digest_size=8)
    digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return int.from_bytes(digest.digest(), "little") >> 1
