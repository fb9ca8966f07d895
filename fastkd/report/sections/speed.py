"""Training speed, and the share of the time spent waiting for data."""

from statistics import median

from ...utils.numbers import DASH, decimals, percent, prefixed, seconds
from ..comparison import Comparison
from ..page import UNKNOWN, Cell, Column, Row, Section, Table

POSITION = 30
_COLUMNS = (
    Column("steps"), Column("positions"), Column("speed", "positions/s ↑, median"),
    Column("waiting", "share of time ↓"), Column("time"), Column("hardware", text=True),
)  # fmt: skip


def build(comparison: Comparison) -> Section | None:
    """A row per student."""
    rows: list[Row] = []
    for run, series in comparison.students:
        if not run.steps:
            continue
        rate, step_seconds, positions = (
            run.logged(name)[1] for name in ("positions_per_second", "seconds", "positions")
        )
        cells = [
            Cell(decimals(len(run.steps))),
            Cell(prefixed(sum(positions))) if sum(positions) else UNKNOWN,
            Cell(prefixed(median(rate))) if rate else UNKNOWN,
            UNKNOWN if run.waiting is None else Cell(percent(run.waiting, 2)),
            Cell(seconds(sum(step_seconds))) if step_seconds else UNKNOWN,
            Cell(run.hardware or DASH, tone="aside"),
        ]
        rows.append(Row(run.name, cells, series=series))
    caption = "Waiting: share of a step's time in which the next batch was not ready; the target is below 1%."
    return Section("Training speed", [Table("", _COLUMNS, rows, caption)]) if rows else None
