"""From runs to the sections of a page: pure functions. `demo_sections.py` has those that runs know nothing of."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from ..errors import StreamError
from ..evaluate.api import Evaluation, compare
from ..utils.intervals import Interval
from ..utils.numbers import (
    DASH,
    THIN,
    decimals,
    figures,
    percent,
    prefixed,
    seconds,
    with_half,
)
from ..utils.text import without_credentials
from .measures import (
    MEASURES,
    PERPLEXITY,
    WORDS,
    Measure,
    cell,
    column,
    difference_cell,
    perplexity,
    verdict,
)
from .page import (
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
    Paragraph,
    Row,
    Section,
    Series,
    Table,
)
from .runs import Run, finite

UNKNOWN = Cell(DASH, tone="aside")
_LOGGED = (
    ("loss", "Training loss", "nats a position",
     "What is minimised: α · hard + (1 − α) · T² · soft. With other α or T it is another thing: compare the parts."),
    ("soft", "Soft part", "nats a position", "The divergence from the teacher; lower is nearer to it."),
    ("hard", "Hard part", "nats a position", "Cross-entropy on the labels of the training data; lower is better."),
)  # fmt: skip
_SCHEDULES = (("rate", "Learning rate", ""), ("alpha", "α, weight of the hard part", ""), ("temperature", "T", ""),
              ("grad_norm", "Norm of the gradient", ""))  # fmt: skip


def students(runs: Sequence[Run]) -> list[tuple[Run, Series]]:
    """Each run and then its control, with how they are drawn."""
    found: list[tuple[Run, Series]] = []
    for run in runs:
        found.append((run, Series(run.name, len(found))))
        if run.control is not None:
            found.append((run.control, Series(run.control.name, len(found), dashed=True)))
    return found


def headline(run: Run, title: str = "") -> Section | None:
    """The figures to be seen first: a run against its control, where there are pairs, and how long it waited."""
    cards: list[Card] = []
    pairs = paired(run, run.control)
    for key in ("kl_bucket", "kl_sampled", "agreement", "cross_entropy"):
        measure = next(m for m in MEASURES if m.name == key)
        if key not in run.measures or (key == "kl_sampled" and "kl_bucket" in run.measures):
            continue
        mean, half = with_half(*run.measures[key], scale=measure.scale)
        unit = f"{THIN}%" if measure.unit == "%" else ""
        more, tone = (f"±{THIN}{half}{unit or ' ' + measure.unit}" if half else ""), ""
        if run.control is not None and key in run.control.measures and not pairs:
            more = f"its control: {cell(measure, run.control.measures).text}{unit}"
        if key in pairs:
            tone = verdict(measure, pairs[key])
            difference = " ± ".join(with_half(*pairs[key], scale=measure.scale, sign=True)).replace(" ", THIN)
            more = f"{WORDS[tone]}: {difference}{' points' if unit else ''} against the control"
        cards.append(Card(measure.label, mean + unit, more, tone))
    if (share := waiting(run)) is not None:
        cards.append(Card("waiting for data", percent(share, 2), "of the time of training; lower is better"))
    return Section(title, [Cards(cards)]) if cards else None


def held_out(runs: Sequence[Run]) -> Section:
    """The table of students against teacher and control, and their differences."""
    known = [m for m in MEASURES if any(m.name in run.measures for run, _ in students(runs))]
    if not known:
        return Section("Held-out data", [Paragraph("No evaluation was found in these runs.")])
    rows = [*_teachers(runs, known)]
    rows += [
        Row(run.name, [*_size(run), *(cell(m, run.measures) for m in known), perplexity(run.measures)], series=series)
        for run, series in students(runs)
    ]
    columns = [Column("parameters"), Column("size"), Column("speed", "positions/s ↑")]
    found, caption = _evaluated(runs), ""
    if found is not None:
        seen = "that no student was trained on" if found.split == "held_out" else f"of the split {found.split!r}"
        caption = f"{decimals(found.count)} positions in {decimals(found.windows)} windows {seen}."
    blocks: list[Block] = [Table("", [*columns, *(column(m) for m in known), column(PERPLEXITY)], rows, caption)]
    if differences := _differences(runs, known):
        blocks.append(differences)
    elif len(students(runs)) > 1:
        text = "Differences have no intervals here: that takes an evaluation.json of each, of the same windows."
        blocks.append(Paragraph(text, aside=True))
    blocks.append(Notes(_reading(runs, known), "How to read these figures, and which of them are bounds"))
    return Section("Held-out data", blocks)


def paired(ours: Run, theirs: Run | None) -> dict[str, Interval]:
    """Paired differences where both were evaluated on the same windows; else none."""
    if theirs is None or ours.evaluation is None or theirs.evaluation is None:
        return {}
    try:
        return compare(ours.evaluation, theirs.evaluation)
    except StreamError:
        return {}


def _size(run: Run) -> list[Cell]:
    """Parameters, bytes, and the speed of inference: as measured by itself, or as the evaluation ran."""
    speed = run.number("student", "positions_per_second")
    if speed is None and run.evaluation is not None and run.evaluation.timed_positions:
        speed = finite(run.evaluation.positions_per_second)
    numbers = [(run.number("student", "parameters"), ""), (run.number("student", "bytes"), "B"), (speed, "")]
    return [UNKNOWN if n is None else Cell(prefixed(n, unit)) for n, unit in numbers]


def _teachers(runs: Sequence[Run], known: Sequence[Measure]) -> Iterator[Row]:
    """A row for the teacher of each cache: what the cache knows of it."""
    seen: set[str] = set()
    for run, _ in students(runs):
        found = run.evaluation
        if found is None or found.content in seen:
            continue
        seen.add(found.content)
        of = found.teacher_intervals()
        cells = [
            UNKNOWN if (n := run.number("teacher", name)) is None else Cell(prefixed(n, unit))
            for name, unit in (("parameters", ""), ("bytes", "B"), ("positions_per_second", ""))
        ]
        for measure in known:
            if measure.name.startswith("kl_"):
                cells.append(Cell("0", tone="aside"))
            elif measure.name == "agreement":
                cells.append(Cell("100", tone="aside"))
            elif measure.name == "cross_entropy":
                cells.append(_at_least(measure, of))
            else:
                cells.append(cell(measure, of))
        least = of["cross_entropy_at_least"].mean
        cells.append(Cell(f"≥{THIN}{figures(math.exp(min(least, 700.0)))}"))
        yield Row("teacher", cells, note="from its cached rows", series=Series("teacher", None))


def _at_least(measure: Measure, of: Mapping[str, Interval]) -> Cell:
    mean, half = with_half(*of["cross_entropy_at_least"], scale=measure.scale)
    return Cell(f"≥{THIN}{mean}", f"±{THIN}{half}")


def _reading(runs: Sequence[Run], known: Sequence[Measure]) -> list[tuple[str, str]]:
    """What the table's words mean, and which of its figures are bounds."""
    notes = [("±, ranges", "95% intervals; windows are the independent units.")]
    notes += [(m.short, m.about) for m in known]
    found = _evaluated(runs)
    if found is not None:
        of = found.teacher_intervals()
        says = (
            f"What its cache knows. {percent(of['label_known'].mean)} of the labels are among the cached entries and "
            "have their exact probability; another has no more than the mass outside them, so that the cross-entropy "
            "is at least what is shown (≥). By definition it is at no distance from itself."
        )
        if "entropy_at_least" in of:
            low, high = (figures(of[f"entropy_at_{end}"].mean) for end in ("least", "most"))
            says += (
                f" {percent(of['tail_mass'].mean)} of its probability lies outside the head; its entropy is between "
                f"{low} and {high} nats."
            )
        notes.append(("teacher", says))
        notes.append(("speed", f"Of the student's forward during the evaluation, on {found.device}."))
    return notes


def _evaluated(runs: Sequence[Run]) -> Evaluation | None:
    """The first evaluation there is."""
    return next((run.evaluation for run, _ in students(runs) if run.evaluation is not None), None)


def _differences(runs: Sequence[Run], known: Sequence[Measure]) -> Table | None:
    """Each run against its control, and against the first run."""
    rows: list[Row] = []
    of = {id(run): series for run, series in students(runs)}
    for number, run in enumerate(runs):
        others = [(run.control, "its control")] if run.control is not None else []
        others += [(runs[0], runs[0].name)] if number else []
        for other, name in others:
            if found := paired(run, other):
                cells = [difference_cell(m, found) for m in known]
                rows.append(Row(run.name, cells, f"against {name}", of[id(run)]))
    if not rows:
        return None
    return Table(
        "difference",
        [column(m) for m in known],
        rows,
        "Paired over the windows: what makes a window hard for all drops out. A difference within its 95% interval is "
        "called noise. Of one training run each: how much another seed would move the figures, they do not tell.",
    )


def _reliability(runs: Sequence[Run]) -> Chart | None:
    lines: list[Line] = []
    for run, series in students(runs):
        if run.evaluation is None:
            continue
        if not lines and (bins := run.evaluation.teacher.reliability()):
            lines.append(_reliable(Series("teacher", None), bins))
        if bins := run.evaluation.student.reliability():
            lines.append(_reliable(series, bins))
    if not lines:
        return None
    caption = "On the dotted line a model is right as often as it claims; below it, it claims too much."
    return Chart("reliability", "Calibration", caption, "confidence", "accuracy", lines, diagonal=True)


def _reliable(series: Series, bins: Sequence[Mapping[str, float]]) -> Line:
    return Line(series, [b["confidence"] for b in bins], [b["accuracy"] for b in bins], markers=True)


def curves(runs: Sequence[Run]) -> Section:
    """What was logged of each step, and the held-out measures on the way."""
    everyone = students(runs)
    charts: list[Chart] = []
    for name, title, unit, caption in _LOGGED:
        lines = [Line(s, *points) for run, s in everyone if (points := run.logged(name))[0]]
        if lines:
            charts.append(Chart(f"training-{name}", title, caption, "step", unit, lines))
    for measure in MEASURES:
        lines = [line for run, series in everyone if (line := _held_out_line(run, series, measure)) is not None]
        if not lines:
            continue
        unit = measure.unit
        caption = f"Held out; {measure.better} is better."
        if any(line.band is not None for line in lines):
            caption += " Bands: 95% intervals of each alone, wider than those of the pairs."
        level = _teacher_level(runs, measure)
        title = f"Held out: {measure.short}"
        charts.append(Chart(f"held-out-{measure.name}", title, caption, "step", unit, lines, level))
    if chart := _reliability(runs):
        charts.append(chart)
    if not charts:
        return Section("Curves", [Paragraph("Nothing was logged in these runs: no metrics.jsonl was found.")])
    return Section("Curves", [Charts(charts + _schedules(everyone))])


def _held_out_line(run: Run, series: Series, measure: Measure) -> Line | None:
    points = [(p.step, p.measures[measure.name]) for p in run.points if measure.name in p.measures]
    if not points:
        return None
    x, y = [step for step, _ in points], [measure.scale * found.mean for _, found in points]
    band = None
    if all(math.isfinite(found.half) for _, found in points):
        low, high = ([measure.scale * getattr(found, end) for _, found in points] for end in ("low", "high"))
        band = low, high
    return Line(series, x, y, band, markers=True)


def _teacher_level(runs: Sequence[Run], measure: Measure) -> tuple[float, str] | None:
    found = _evaluated(runs)
    if found is None or measure.name not in ("accuracy", "ece", "cross_entropy"):
        return None
    of = found.teacher_intervals()
    key, name = measure.name, "teacher"
    if key == "cross_entropy":
        key, name = "cross_entropy_at_least", "teacher, at least"
    return (measure.scale * of[key].mean, name) if key in of else None


def _schedules(everyone: Sequence[tuple[Run, Series]]) -> list[Chart]:
    """What changed over the steps, of what is set; a constant is told in the settings."""
    charts: list[Chart] = []
    for name, title, unit in _SCHEDULES:
        lines = [Line(s, *points) for run, s in everyone if (points := run.logged(name))[0]]
        if any(len(set(line.y)) > 1 for line in lines):
            charts.append(Chart(f"training-{name}", title, "As it was at each step.", "step", unit, lines))
    return charts


def speed(runs: Sequence[Run]) -> Section | None:
    """How fast training was, and what of its time it waited for data."""
    rows: list[Row] = []
    for run, series in students(runs):
        if not run.steps:
            continue
        rate, each = (run.logged(name)[1] for name in ("positions_per_second", "seconds"))
        positions = sum(run.logged("positions")[1])
        cells = [
            Cell(decimals(len(run.steps))),
            Cell(prefixed(positions)) if positions else UNKNOWN,
            Cell(prefixed(median(rate))) if rate else UNKNOWN,
            UNKNOWN if (share := waiting(run)) is None else Cell(percent(share, 2)),
            Cell(seconds(sum(each))) if each else UNKNOWN,
            Cell(run.hardware or DASH, tone="aside"),
        ]
        rows.append(Row(run.name, cells, series=series))
    if not rows:
        return None
    columns = [
        Column("steps"), Column("positions"), Column("speed", "positions/s ↑, median"),
        Column("waiting", "share of time ↓"), Column("time"), Column("hardware", text=True),
    ]  # fmt: skip
    caption = "Waiting: the share of a step's time in which the next batch was not there yet; the aim is below 1%."
    return Section("Speed of training", [Table("", columns, rows, caption)])


def waiting(run: Run) -> float | None:
    """The share of the steps' time in which there was no batch; None where it was not logged."""
    pairs = [(w, s) for step in run.steps if (w := finite(step.get("waiting"))) is not None
             and (s := finite(step.get("seconds"))) is not None]  # fmt: skip
    total = sum(s for _, s in pairs)
    return sum(w * s for w, s in pairs) / total if total > 0 else None


def settings(runs: Sequence[Run]) -> Section:
    """The settings that differ, and on demand all of them."""
    everyone = [run for run, _ in students(runs)]
    flat = [
        dict(_flat(run.part("settings")))
        | dict(_flat({"student": run.part("student", "name"), "cache": [spec[:12] for _, spec in run.caches]}))
        | dict(_flat(run.part("machine"), "machine"))
        for run in everyone
    ]
    names = list(dict.fromkeys(name for found in flat for name in found))
    if not names:
        return Section("Settings", [Paragraph("No settings were kept in these runs.")])
    columns = [Column(run.name, text=True) for run in everyone]

    def row(name: str, marked: bool) -> Row:
        return Row(name, [Cell(found[name]) if name in found else UNKNOWN for found in flat], marked=marked)

    differ = [name for name in names if len({found.get(name) for found in flat}) > 1]
    blocks: list[Block] = []
    if differ:
        blocks.append(Table("setting", columns, [row(n, True) for n in differ], "What differs between the columns."))
    elif len(everyone) > 1 and names:
        blocks.append(Paragraph("All runs have the same settings."))
    same = [name for name in names if name not in differ]
    if same:
        title = f"{len(same)} settings that all have in common" if len(everyone) > 1 else f"All {len(same)} settings"
        shared = [Column("value", text=True)]
        rows = [Row(name, [Cell(flat[0][name])]) for name in same]
        blocks.append(Table("setting", shared, rows, folded=title))
    return Section("Settings", blocks)


def reproduce(runs: Sequence[Run], command: str = "") -> Section:
    """The commands that were typed. command: the one that made the report."""
    blocks: list[Block] = []
    for run in runs:
        if run.command:
            blocks.append(Code(run.command, run.name))
        if run.control is not None and run.control.command and run.control.command != run.command:
            blocks.append(Code(run.control.command, run.control.name))
    missing = [run.name for run in runs if not run.command]
    if missing:
        blocks.append(Paragraph(f"No command was kept of: {', '.join(missing)}.", aside=True))
    if command:
        blocks.append(Code(command, "this page"))
    notes = [(run.name, note) for run, _ in students(runs) for note in run.notes]
    blocks += [Paragraph(f"{name}: {without_credentials(note)}", aside=True) for name, note in notes]
    return Section("To do it again", blocks)


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as names with dots, and text."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(inner, f"{prefix}.{name}" if prefix else str(name))
    elif prefix and value not in (None, []):
        yield prefix, _plain(value)


def _plain(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return without_credentials(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    number = finite(value)
    if number is not None:
        return f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_plain(inner)}" for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    return json.dumps(value)
