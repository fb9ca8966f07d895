"""The sections of a report, one module each, with `POSITION`, its place on the page (lower is higher up), and `build`,
from a `Comparison` of runs to a `Section`, or None if there is nothing to show.

A new section is a new module here; code outside the package calls `register_section`.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable, Sequence

from ..page import Section
from ..runs import Comparison

Build = Callable[[Comparison], Section | None]
MORE = 15.0  # the position of the caller's own sections: after the held-out measures

_registered: list[tuple[float, Build]] = []


def register_section(build: Build, position: float) -> Build:
    """Add a section to every report from now on. Positions of the built-in ones are 0, 10, 12, 20, ..., 60."""
    _registered.append((position, build))
    return build


def build_sections(comparison: Comparison, more: Sequence[Section] = ()) -> list[Section]:
    """All sections of a page, in order."""
    found = [(position, build(comparison)) for position, build in [*_built_in(), *_registered]]
    found += [(MORE, section) for section in more]
    return [section for _, section in sorted(found, key=lambda entry: entry[0]) if section is not None]


@functools.cache
def _built_in() -> list[tuple[float, Build]]:
    modules = [importlib.import_module(f"{__name__}.{name}") for _, name, _ in pkgutil.iter_modules(__path__)]
    return [(module.POSITION, module.build) for module in modules]
