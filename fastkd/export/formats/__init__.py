"""Formats of other programs, by name: `--to safetensors-features` is formats/safetensors_features.py.

Belongs here: one module for each format, named after it, with a class `Format` (see `Format` in this file). Does not:
what is the same for all of them: which samples there are, resuming, checks of the cache.
"""

import pkgutil
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ...errors import ExportError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..samples import Sample


class Format(Protocol):
    """What a module of this folder defines: a class of this name.

    NEEDS_TEACHER: whether it needs modules of the teacher that are not in the cache. It is made with the folder, the
    features (names of layers in order, "-1" last), the dtype of the states on disk, and the teacher's final norm (None
    unless needed), and raises ExportError, before it writes anything, for a selection that its readers do not take.
    Every file that it writes appears whole or not at all.
    """

    NEEDS_TEACHER: ClassVar[bool]

    def __init__(
        self, folder: Path, features: Sequence[str], dtype: "torch.dtype", norm: "nn.Module | None"
    ) -> None: ...

    def write(self, number: int, sample: "Sample") -> int:
        """Write a sample, unless its file is there. number: of the sample, from 0. Returns the bytes of its file."""

    def finish_shard(self, shard: int, first: int, inputs: Mapping[str, Sequence[Any]]) -> None:
        """After the samples of a shard. first: number of the first; inputs: tokens and loss masks of all of them."""

    def finish(self, shards: Sequence[int]) -> None:
        """After all shards, which are given in order. Called again by an export that is repeated."""


def names() -> list[str]:
    """The formats, by the names that the command line takes."""
    found = pkgutil.iter_modules(__path__)
    return sorted(module.name.replace("_", "-") for module in found if not module.name.startswith("_"))


def find(name: str) -> type[Format]:
    """The format of this name. ExportError if there is none."""
    if name not in names():
        raise ExportError(f"--to: got {name!r}; expected one of {', '.join(names())}.")
    found: type[Format] = import_module(f".{name.replace('-', '_')}", __name__).Format
    return found
