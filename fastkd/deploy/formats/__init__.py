"""Formats of runtimes, by name: `fastkd export --to onnx` is formats/onnx.py.

Belongs here: one module for each format, named after it, with the members of `Format` (see this file); and what several
of them share, in modules whose names begin with an underscore. Does not: choosing the folder, what is measured.
"""

import pkgutil
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from ...errors import ExportError
from ...utils.packages import is_installed
from ...utils.similar import did_you_mean
from ..calibration import Calibration
from ..model import Deployable
from ..runtime import Runtime


class Format(Protocol):
    """What a module of this folder defines.

    EXTRA: the extra of fastkd with the packages that it needs. PACKAGES: their import names, which are looked for
    before a model is loaded; both empty if there are none. QUANTIZE: what it can write, of "none", "int8" and "int4".
    The module itself imports none of the packages, but where they are used.
    """

    EXTRA: str
    PACKAGES: tuple[str, ...]
    QUANTIZE: tuple[str, ...]

    @staticmethod
    def check(model: Deployable, quantize: str) -> None:
        """Raise ExportError in one sentence for a model that it cannot take: its architecture, or an int4 group that
        does not divide a width. Nothing has been written."""

    @staticmethod
    def write(model: Deployable, folder: Path, quantize: str, calibration: Calibration | None) -> dict[str, Any]:
        """Write the model's files into an empty folder, which gets its name when all is written. calibration: inputs of
        the training split, None without a cache. Returns what `load` needs, in values that JSON can hold; "notes", a
        list of texts, is shown to the user."""

    @staticmethod
    def load(folder: Path, written: dict[str, Any], threads: int) -> Runtime:
        """The files in a folder, ready to run. written: what `write` returned. Raises ExportError if they are damaged,
        or of a version that it cannot run."""


def names() -> list[str]:
    """The formats, by the names that the command line takes."""
    found = pkgutil.iter_modules(__path__)
    return sorted(module.name for module in found if not module.name.startswith("_"))


def find(name: str) -> Format:
    """The format of this name. ExportError if there is none, or a package that it needs is not installed."""
    if name not in names():
        raise ExportError(f"to: got {name!r}; expected one of {', '.join(names())}.{did_you_mean(name, names())}")
    found = cast(Format, import_module(f".{name}", __name__))
    missing = [package for package in found.PACKAGES if not is_installed(package)]
    if missing:
        raise ExportError(
            f"to: got {name!r}, which needs {', '.join(missing)}; expected it to be installed. Use pip install "
            f"'fastkd[{found.EXTRA}]'."
        )
    return found


def check_quantize(to: str, found: Format, quantize: str) -> None:
    """ExportError for a quantisation that the format cannot write."""
    if quantize not in found.QUANTIZE:
        raise ExportError(
            f"quantize: got {quantize!r} with the format {to}; expected one of {', '.join(found.QUANTIZE)}."
        )
