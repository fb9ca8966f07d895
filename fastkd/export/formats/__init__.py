"""Formats of other programs, by name: `--to safetensors-features` is formats/safetensors_features.py.

Belongs here: one module for each format, named after it, with a class `Format` (see `Format` in this file); and what
several of them share, in modules whose names begin with an underscore. Does not: resuming, and the loop over shards.
"""

import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from ...errors import ExportError
from ...settings import ModelSettings
from ...utils.similar import did_you_mean

if TYPE_CHECKING:
    from ...cache import Cache
    from ...utils.signals import Stop

DTYPE = "bfloat16"


@dataclass(frozen=True)
class Options:
    """What a format may be asked for. A format names those that it takes in `OPTIONS`.

    features: layers whose states are written, in order; () means all states of the cache, and "-1" (what enters the
    final norm) is always the last. dtype: of the states on disk. columns: a name of a set of columns, None for the
    format's own. teacher: a `Teacher` or its name, for formats that need its final norm; settings: how it is loaded.
    """

    features: tuple[str, ...] = ()
    dtype: str = DTYPE
    columns: str | None = None
    teacher: Any = None
    settings: ModelSettings = field(default_factory=ModelSettings)

    def check(self, kind: "type[Format]", to: str) -> None:
        """Raise ExportError, naming it, for an option that is given and that the format does not take."""
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name not in kind.OPTIONS and value != option.default and option.name != "settings":
                raise ExportError(f"{option.name}: got {value!r} with to={to!r}, which takes none. Leave it out.")


class Written(NamedTuple):
    """What was written of a shard. whole: False if the export was stopped before its end."""

    samples: int
    tokens: int
    bytes: int
    whole: bool = True


class Format(Protocol):
    """What a module of this folder defines: a class of this name.

    It is made with the cache, the output folder and the options, and raises ExportError, before it writes anything, for
    a cache or a selection that its readers do not take. settings: what decides its bytes, beside the cache, in JSON;
    features: the layers that it writes. Every file that it writes appears whole or not at all.
    """

    OPTIONS: ClassVar[frozenset[str]]
    settings: Mapping[str, Any]
    features: tuple[str, ...]

    def __init__(self, cache: "Cache", folder: Path, options: Options) -> None: ...

    def write_shard(self, shard: int, first: int, stop: "Stop") -> Written:
        """Write a shard, which may be there in part, until stop.asked. first: the number of its first sample."""

    def finish(self, shards: Sequence[int]) -> None:
        """After all shards, which are given in order. Called again by an export that is repeated."""


def names() -> list[str]:
    """The formats, by the names that the command line takes."""
    found = pkgutil.iter_modules(__path__)
    return sorted(module.name.replace("_", "-") for module in found if not module.name.startswith("_"))


def find(name: str) -> type[Format]:
    """The format of this name. ExportError if there is none."""
    if name not in names():
        raise ExportError(f"to: got {name!r}; expected one of {', '.join(names())}.{did_you_mean(name, names())}")
    found: type[Format] = import_module(f".{name.replace('-', '_')}", __name__).Format
    return found
