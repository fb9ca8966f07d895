"""The page of a deploy report: a table of the student and its exports, two plots, and how each number was measured."""

from collections.abc import Sequence

from ..evaluate.measures import MEASURES, about
from ..report.measures import cell, column
from ..report.page import (
    UNKNOWN,
    Block,
    Card,
    Cards,
    Cell,
    Chart,
    Charts,
    Code,
    Column,
    Line,
    Notes,
    Page,
    Paragraph,
    Row,
    Section,
    Series,
    Table,
)
from ..utils.intervals import NO_INTERVAL, Interval
from ..utils.numbers import THIN, figures, prefixed, with_half
from ..utils.words import EXAMPLES, TEXT
from .quality import AGREEMENT
from .result import DeployReport, DeployRow, above_text


def page_of(report: DeployReport, command: str = "") -> Page:
    """The page. command: how to make it again."""
    count = len(report.rows) - 1
    each = f"{report.threads} thread{'s' * (report.threads > 1)}"
    lead = (
        f"{report.student} in PyTorch, and {count} export{'s' * (count > 1)} of it, each in its own runtime: size, "
        f"latency and memory ({each}, batch 1), and quality against the teacher on held-out data."
    )
    series = [_series(report.rows, i) for i in range(len(report.rows))]
    sections = [Section("", [_cards(report)])] if report.measure else []
    failed = [row for row in report.rows if row.above]
    if failed:
        texts = [Paragraph(above_text(row.name, row.quality, report.at_most)) for row in failed]
        sections.append(Section("Costs more than allowed", texts))
    sections.append(Section("Exports", [_table(report, series)]))
    if report.measure:
        sections.append(Section("Quality", [_quality(report, series), *_charts(report, series)]))
    sections.append(Section("How these numbers are measured", [_notes(report)]))
    sections += [Section("Commands", [Code(command, "this page")])] if command else []
    foot = "Made by fastkd deploy-report. This page is one file and loads nothing from the network."
    return Page("Deployment: what each export costs", lead, sections, foot)


def _series(rows: Sequence[DeployRow], index: int) -> Series:
    return Series(rows[index].name, None if index == 0 else index - 1)


def _cards(report: DeployReport) -> Cards:
    """For each export, what it costs in nats."""
    cards = []
    for row in report.rows[1:]:
        if row.quality is None:
            continue
        mean, half = with_half(*row.quality.cost, sign=True)
        of = f"±{THIN}{half}" if half else "no interval,"
        more = f"{of} nats of KL to the teacher; {figures(row.ratio, 2)} of the size"
        cards.append(Card(row.name, mean, more, "bad" if row.above else ""))
    return Cards(cards)


def _table(report: DeployReport, series: Sequence[Series]) -> Table:
    """Size, latency and memory, each with its ratio to PyTorch's."""
    text = report.prompt > 0
    columns = [Column("size", "on disk ↓")]
    columns += [Column(f"prefill of {report.prompt}", "ms ↓"), Column("decoded token", "ms ↓")] if text else []
    columns += [] if text else [Column("one example", "ms ↓")]
    columns += [Column("peak memory", "above an empty process ↓"), Column("runtime", text=True)]
    rows = []
    for row, line in zip(report.rows, series, strict=True):
        m = row.measured
        cells = [ratio_cell(prefixed(row.bytes, "B"), row.ratio), _time(m.prefill, m.ratios.get("prefill"))]
        cells += [_time(m.decode, m.ratios.get("decode"))] if text else []
        cells.append(UNKNOWN if m.memory is None else ratio_cell(prefixed(m.memory, "B"), m.ratios.get("memory")))
        rows.append(Row(row.name, [*cells, Cell(m.runtime)], series=line))
    caption = f"Ratios are to PyTorch's in the same run. Medians of {report.turns} turns."
    return Table("", columns, rows, caption)


def ratio_cell(text: str, ratio: float | None) -> Cell:
    """A number with its ratio to PyTorch's, if that is known."""
    return Cell(text, "" if ratio is None else f"ratio {figures(ratio, 2)}")


def _time(seconds: float | None, ratio: float | None) -> Cell:
    return UNKNOWN if seconds is None else ratio_cell(figures(1000 * seconds), ratio)


def _quality(report: DeployReport, series: Sequence[Series]) -> Table:
    """Measures of the student and its exports, and the differences from the student."""
    assert report.measure is not None
    kl, ce = MEASURES[report.measure], MEASURES["cross_entropy"]
    shown = [kl, MEASURES["agreement"], MEASURES[AGREEMENT], ce]
    shown = [m for m in shown if any(m.name in row.intervals for row in report.rows)]
    columns = [
        column(kl),
        Column("cost in KL", "nats ↓"),
        *(column(m) for m in shown[1:]),
        Column("cost in cross-entropy", "nats ↓"),
    ]
    rows = []
    for row, line in zip(report.rows, series, strict=True):
        values = row.intervals
        differences: dict[str, Interval] = {}
        if row.quality is not None and row is not report.rows[0]:
            differences = row.quality.differences
        cells = [cell(kl, values), cell(kl, differences, difference=True), *(cell(m, values) for m in shown[1:])]
        rows.append(Row(row.name, [*cells, cell(ce, differences, difference=True)], series=line))
    found = next(row.quality for row in report.rows if row.quality is not None).exported
    words = found.words
    counted = words.counted(found.count, found.windows, before="held-out")
    how = "95% intervals" if found.windows > 1 else NO_INTERVAL.capitalize()
    caption = f"{counted}. {how}; costs are paired by {words.window}."
    return Table("", columns, rows, caption)


def _charts(report: DeployReport, series: Sequence[Series]) -> list[Block]:
    """KL to the teacher against size, and against latency."""
    assert report.measure is not None
    text = report.prompt > 0
    speed, label = ("decode", "decoded token, ms") if text else ("prefill", "one example, ms")
    known = [(row, line) for row, line in zip(report.rows, series, strict=True) if report.measure in row.intervals]

    def lines(x: dict[str, float]) -> list[Line]:
        found = []
        for row, line in known:
            y = row.intervals[report.measure or ""]
            found.append(Line(line, [x[row.name]], [y.mean], markers=True))
        return found

    sizes = {row.name: row.bytes / 1e6 for row, _ in known}
    times = {row.name: 1000 * (getattr(row.measured, speed) or 0.0) for row, _ in known}
    y_label = f"{MEASURES[report.measure].label}, nats"
    size = Chart(
        "size", "Quality by size", "Lower and further left is better.", "size on disk, MB", y_label, lines(sizes)
    )
    time = Chart("time", "Quality by latency", "Lower and further left is better.", label, y_label, lines(times))
    return [Charts([size, time])]


def _notes(report: DeployReport) -> Notes:
    text = report.prompt > 0
    latency = (
        f"The seconds of a prefill of {report.prompt} tokens, and of a decoded token after it (the median of eight). "
        if text
        else "The seconds of one example (the median of eight). "
    )
    measures = MEASURES[report.measure or "kl_bucket"], MEASURES[AGREEMENT]
    words, alone = (TEXT, ", a document at a time and without padding") if text else (EXAMPLES, "")
    items = [
        ("size", "The files of the format, without tokenizer and configs; of the student, its weights."),
        (
            "latency",
            latency + "Batch 1, each model in a process of its own. They take turns, and a "
            "ratio is the median over the turns of the time over PyTorch's in the same turn.",
        ),
        (
            "peak memory",
            "The most that the process has had, above what it had before it loaded the model, with PyTorch imported: "
            "the weights, and what the runtime needs to run them.",
        ),
        (
            "quality",
            f"Each export runs in its own runtime over the cache's held-out split{alone}, and so does the student in "
            f"PyTorch. {' '.join(f'{m.label}: {about(m, words)}' for m in measures)}",
        ),
        ("cost", f"The export's measure minus that of the unquantised student in PyTorch, paired by {words.window}."),
    ]
    return Notes(items if report.measure else items[:3])
