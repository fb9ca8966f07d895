"""The sections of a report, one module each, with `POSITION`, its place on the page (lower is higher up), and `build`,
from a `Comparison` of runs to a `Section`, a list of them, or None if there is nothing to show. It is called for pages
with runs; with `OF_SWEEPS = True` also for pages of sweeps alone.

A new section is a new module here; code outside the package calls `register_section`.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable, Sequence

from ..page import Section
from ..runs import Comparison

Build = Callable[[Comparison], "Section | list[Section] | None"]
MORE = 15.0  # the position of the caller's own sections: after the held-out measures

_registered: list[tuple[float, Build]] = []


def register_section(build: Build, position: float) -> Build:
    """Add a section to every report from now on. Positions of the built-in ones are -10, 0, 10, 12, 20, ..., 60."""
    _registered.append((position, build))
    return build


def build_sections(comparison: Comparison, more: Sequence[Section] = ()) -> list[Section]:
    """All sections of a page, in order."""
    built_in = [(position, build) for position, build, of_sweeps in _built_in() if of_sweeps or comparison.runs]
    found = [
        (position, section) for position, build in [*built_in, *_registered] for section in _list(build(comparison))
    ]
    found += [(MORE, section) for section in more]
    return [section for _, section in sorted(found, key=lambda entry: entry[0])]


def _list(found: "Section | list[Section] | None") -> list[Section]:
    return found if isinstance(found, list) else [] if found is None else [found]


@functools.cache
def _built_in() -> list[tuple[float, Build, bool]]:
    modules = [importlib.import_module(f"{__name__}.{name}") for _, name, _ in pkgutil.iter_modules(__path__)]
    return [(module.POSITION, module.build, getattr(module, "OF_SWEEPS", False)) for module in modules]
