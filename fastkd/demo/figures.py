"""The demo's figures beside the limits that they are held to."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..report.page import Cell, Column, Row, Section, Table
from ..report.runs import Run


@dataclass(frozen=True)
class Figure:
    """What was measured, and the most that it may be. text: as a person reads it; of limits too."""

    name: str
    value: float
    limit: float
    text: str
    limit_text: str

    @property
    def met(self) -> bool:
        """Whether it is within its limit."""
        return self.value <= self.limit

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self) | {"met": self.met}


def figures_of(*, overhead: float, step: float, runs: Sequence[Run], bytes_per_position: float) -> list[Figure]:
    """All four. runs: those that were trained, with their controls."""
    shares = [share for run in runs if (share := run.waiting) is not None]
    most = max(shares)
    return [
        Figure("capture over the bare teacher", overhead, 1.08, f"{overhead:.3f}", "1.08"),
        Figure("share of training that waited for data", most, 0.01, f"{most:.2%}", "1%"),
        Figure("a step over one of cross-entropy alone", step, 1.05, f"{step:.3f}", "1.05"),
        Figure("bytes a position", bytes_per_position, 108.0, f"{bytes_per_position:.1f}", "108"),
    ]


def figures_text(figures: Sequence[Figure]) -> list[str]:
    """A line each."""
    lines = [f"{'':<40}{'measured':>10}{'at most':>10}"]
    for f in figures:
        lines.append(f"  {f.name:<38}{f.text:>10}{f.limit_text:>10}  {'ok' if f.met else 'MISSED'}")
    return lines


def figures_section(figures: Sequence[Figure]) -> Section:
    """For a page."""
    rows = []
    for f in figures:
        tone, mark = ("good", "met") if f.met else ("bad", "missed")
        rows.append(Row(f.name, [Cell(f.text, tone=tone, mark=mark), Cell(f.limit_text)]))
    return Section("Against the limits", [Table("", [Column("measured"), Column("at most")], rows)])
