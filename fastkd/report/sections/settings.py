"""The settings of the runs: those that differ, and the others on demand."""

from collections.abc import Iterator, Mapping
from typing import Any

from ...utils.numbers import DASH
from ..page import Block, Cell, Column, Paragraph, Row, Section, Table
from ..runs import Comparison

POSITION = 40


def build(comparison: Comparison) -> Section:
    """A table of what differs, and a folded one of what all runs share."""
    runs = [run for run, _ in comparison.students]
    flat = []
    for run in runs:
        more = {"student": run.part("student", "name"), "cache": [_cache(place, spec) for place, spec in run.caches]}
        flat.append(dict([*_flat(run.part("settings")), *_flat(more), *_flat(run.part("machine"), "machine")]))
    # one that was only evaluated has no settings, and does not differ
    trained = [values for run, values in zip(runs, flat, strict=True) if run.part("settings")] or flat
    names = list(dict.fromkeys(name for values in trained for name in values))
    if not names:
        return Section("Settings", [Paragraph("These runs have no settings.")])
    blocks: list[Block] = []
    differ = [name for name in names if len({values.get(name) for values in trained}) > 1]
    if differ:
        rows = [Row(name, [Cell(values.get(name, DASH)) for values in flat], marked=True) for name in differ]
        columns = [Column(run.name, text=True) for run in runs]
        blocks.append(Table("setting", columns, rows, "Only what differs between the columns."))
    elif len(runs) > 1:
        blocks.append(Paragraph("All runs have the same settings."))
    if same := [name for name in names if name not in differ]:
        title = f"{len(same)} settings that all runs have in common" if len(runs) > 1 else f"All {len(same)} settings"
        rows = [Row(name, [Cell(trained[0][name])]) for name in same]
        blocks.append(Table("setting", [Column("value", text=True)], rows, folded=title))
    return Section("Settings", blocks)


def _cache(place: str, spec: str) -> str:
    """The last part of where a cache is, and the beginning of its hash."""
    name = place.rstrip("/").rpartition("/")[2]
    return f"{name} ({spec[:12]})" if name and spec else name or spec[:12]


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as dotted names and text."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(inner, f"{prefix}.{name}" if prefix else str(name))
    elif prefix and value not in (None, []):
        yield prefix, _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_plain(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
