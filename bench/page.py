"""Recordings as a page: plots of rates and memory by size, with limits, and tables of all rows."""

from collections.abc import Mapping, Sequence

from fastkd.bench.hardware import named
from fastkd.bench.load import load_text
from fastkd.bench.results import cases_of, figure_text, latest
from fastkd.bench.suites import SUITES
from fastkd.bench.table import Recording, Row
from fastkd.report.page import (
    Block,
    Card,
    Cards,
    Cell,
    Chart,
    Charts,
    Column,
    Line,
    Page,
    Paragraph,
    Section,
    Series,
    Table,
)
from fastkd.report.page import Row as TableRow

LIMIT = "limit"
_AXES = {
    "N": "positions N",
    "D": "width D",
    "V": "vocabulary V",
    "k": "entries k",
    "T": "temperature T",
    "students": "students",
}
_KINDS = {  # by unit: title, and which direction is better
    "GB/s": ("Rate", "Higher is better; bytes of the logits divided by the time"),
    "TFLOP/s": ("Rate", "Higher is better; operations of the products divided by the time"),
    "MiB": ("Memory", "Lower is better; peak without inputs and gradients"),
    "nats": ("Held-out KL", "Lower is better; KL(teacher ‖ student) at T = 1"),
    "s": ("Time", "Lower is better; for all students together"),
}


def page_of(recordings: Sequence[Recording]) -> Page:
    """The page of the latest recording of every suite, size and machine."""
    found = latest(recordings)
    machines = "; ".join(dict.fromkeys(named(dict(r.hardware)) for r in found))
    return Page(
        title="Benchmarks of fastkd",
        lead=f"Measured by fastkd bench on {machines}. Ratios are between runs that alternate in one process.",
        sections=[Section("", [_cards(found)]), *(_section(recording) for recording in found)],
        foot="Made by fastkd bench. This page is one file and loads nothing from the network.",
    )


def _cards(recordings: Sequence[Recording]) -> Cards:
    rows = [row for recording in recordings for row in recording.rows]
    verdicts = [row.verdict for row in rows]
    held, missed = verdicts.count("ok"), verdicts.count("MISSED")
    absent = sum(row.figure is None for row in rows)
    return Cards(
        [
            Card("Limits met", f"{held} of {held + missed}", f"{missed} missed", "bad" if missed else "good"),
            Card("Rows", str(len(rows) - absent), f"in {len(recordings)} suites"),
            Card("Not run", str(absent), "peers that need a GPU or are not installed"),
            *([_quiet(recordings)] if any(recording.load for recording in recordings) else []),
        ]
    )


def _quiet(recordings: Sequence[Recording]) -> Card:
    """During how many suites no other process worked."""
    known = [recording.load for recording in recordings if recording.load]
    quiet = sum(load["quiet"] is True for load in known)
    more = "no other work meanwhile" if quiet == len(known) else "the others: times are not to be trusted"
    return Card("Quiet machine", f"{quiet} of {len(known)}", more, "" if quiet == len(known) else "bad")


def _section(recording: Recording) -> Section:
    suite = SUITES.get(recording.suite)
    says = f"{suite.title}. " if suite else ""
    size = {"full": "Full sizes", "small": "Small sizes"}.get(recording.size, f"Sizes of gpu_day.py ({recording.size})")
    about = f"{says}{size}, {recording.seconds:.0f} s on {named(dict(recording.hardware))}."
    blocks: list[Block] = [Paragraph(about)]
    blocks += [Paragraph(f"The machine: {load_text(recording.load)}.", aside=True)] if recording.load else []
    charts = charts_of(recording)
    blocks += [Charts(charts)] if charts else []
    limited = [row for row in recording.rows if row.limit]
    if limited:
        blocks.append(_table("row", limited, with_case=True))
    blocks += [_table(case, rows, folded=case) for case, rows in cases_of(recording)]
    return Section(recording.suite, blocks)


def charts_of(recording: Recording) -> list[Chart]:
    """A chart for each unit and each size that varies while the others stay the same."""
    rows = [row for row in recording.rows if row.line and row.value is not None and row.unit in _KINDS and row.at]
    names = list(dict.fromkeys(row.line for row in rows if row.line != LIMIT))
    series = {name: Series(name, i) for i, name in enumerate(names)}
    series[LIMIT] = Series("limit, measured in the same run", None)
    found = []
    for unit, (what, says) in _KINDS.items():
        for axis, label in _AXES.items():
            some, fixed = varied([row for row in rows if row.unit == unit], axis)
            if some:
                sizes = ", ".join(f"{n} = {v:g}" for n, v in fixed.items())
                lines = _lines(some, axis, series)
                bands = ["Bands: 20th to 80th percentile of the rounds"] if any(line.band for line in lines) else []
                found.append(
                    Chart(
                        name=f"{recording.suite}-{unit.replace('/', '_')}-{axis}",
                        title=f"{what} against {label}",
                        caption=". ".join([says, *([sizes] if sizes else []), *bands]) + ".",
                        x_label=label,
                        y_label=unit,
                        lines=lines,
                        log=True,
                    )
                )
    return found


def varied(rows: Sequence[Row], axis: str) -> tuple[list[Row], Mapping[str, float]]:
    """The most rows that differ only in one size, and the other sizes; no rows if that size does not vary."""
    groups: dict[tuple[tuple[str, float], ...], list[Row]] = {}
    for row in rows:
        if axis in row.at:
            groups.setdefault(tuple((n, v) for n, v in row.at.items() if n != axis), []).append(row)
    if not groups:
        return [], {}
    rest, found = max(groups.items(), key=lambda group: len({row.at[axis] for row in group[1]}))
    return (found, dict(rest)) if len({row.at[axis] for row in found}) > 1 else ([], {})


def _lines(rows: Sequence[Row], axis: str, series: Mapping[str, Series]) -> list[Line]:
    lines = []
    for name, who in series.items():
        points = sorted((row for row in rows if row.line == name and row.value), key=lambda row: row.at[axis])
        if points:
            ranges = [found for row in points if (found := row.value_range) is not None]
            low, high = ([found[end] for found in ranges] for end in (0, 1))
            band = (low, high) if len(ranges) == len(points) else None
            lines.append(Line(who, [row.at[axis] for row in points], [row.value or 0.0 for row in points], band, True))
    return lines


def _table(head: str, rows: Sequence[Row], *, folded: str = "", with_case: bool = False) -> Table:
    columns = [Column("ratio or figure"), Column("limit"), Column("", text=True)]
    return Table(head, columns, [_row(row, with_case=with_case) for row in rows], folded=folded)


def _row(row: Row, *, with_case: bool) -> TableRow:
    tone = {"ok": "good", "MISSED": "bad"}.get(row.verdict, "")
    figure = Cell(figure_text(row), tone=tone, mark=row.verdict)
    return TableRow(row.name, [figure, Cell(row.limit), Cell(", ".join(row.details()))], row.case if with_case else "")
