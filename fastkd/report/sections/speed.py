"""Training speed, and the share of the time spent waiting for data."""

from statistics import median

from ...utils.numbers import DASH, decimals, percent, prefixed, seconds
from ..page import Cell, Column, Row, Section, Table
from ..runs import Comparison, Run, finite

POSITION = 30


def build(comparison: Comparison) -> Section | None:
    """A row per student."""
    rows: list[Row] = []
    positions_name = comparison.words.positions
    columns = (
        Column("steps"), Column(positions_name), Column("speed", f"{positions_name}/s ↑, median"),
        Column("waiting", "share of time ↓"), Column("time"), Column("hardware", text=True),
    )  # fmt: skip
    for run, series in comparison.students:
        if not run.steps:
            continue
        rate, time, positions = (run.logged(name)[1] for name in ("positions_per_second", "seconds", "positions"))
        cells = [
            decimals(len(run.steps)),
            prefixed(sum(positions) or None),
            prefixed(median(rate) if rate else None),
            percent(run.waiting, 2),
            seconds(sum(time) if time else None),
            _hardware(run) or DASH,
        ]
        rows.append(Row(run.name, [Cell(text) for text in cells], series=series))
    caption = "Waiting: share of a step's time in which the next batch was not ready; the target is below 1%."
    return Section("Training speed", [Table("", columns, rows, caption)]) if rows else None


def _hardware(run: Run) -> str:
    gpu, machine, threads, processes = (run.part("machine", n) for n in ("gpu", "machine", "threads", "processes"))
    words = [gpu or machine, f"{threads} threads" if threads and not gpu else None]
    words += [f"{processes} processes"] if (finite(processes) or 1) > 1 else []
    return ", ".join(str(word) for word in words if word)
