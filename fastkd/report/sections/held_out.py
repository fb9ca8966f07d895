"""Measures on held-out data: students, controls and teacher in one table, and paired differences."""

import math
from collections.abc import Iterator, Sequence

from ...evaluate.measures import Measure, about
from ...utils.intervals import NO_INTERVAL
from ...utils.numbers import THIN, decimals, figures, percent, prefixed, with_half
from ..measures import MEASURES, PERPLEXITY, cell, column, perplexity
from ..page import Block, Cell, Column, Notes, Paragraph, Row, Section, Series, Table
from ..runs import Comparison, Run, finite, paired_differences

POSITION = 10
_ITSELF = {"kl_bucket": "0", "kl_sampled": "0", "agreement": "100"}  # of the teacher against itself


def build(comparison: Comparison) -> Section:
    """The table of measures, the table of differences, and notes on how to read them."""
    students = comparison.students
    known = [m for m in MEASURES.values() if m.name in comparison.measures]
    words = comparison.words
    if not known:
        return Section("Held-out data", [Paragraph("These runs have no evaluation.")])
    rows = [*_teachers(comparison, known)]
    for run, series in students:
        speed = run.number("student", "positions_per_second")
        if speed is None and run.evaluation is not None and run.evaluation.timed_positions:
            speed = finite(run.evaluation.positions_per_second)
        cells = [*_size(run, "student", speed), *(cell(m, run.measures) for m in known), perplexity(run.measures)]
        rows.append(Row(run.name, cells, series=series))
    columns = [Column("parameters"), Column("size"), Column("speed", f"{words.positions}/s ↑")]
    found, caption = comparison.evaluation, ""
    if found is not None:
        which = "that no student was trained on" if found.split == "held_out" else f"of the split {found.split!r}"
        caption = f"{found.words.counted(found.count, found.windows, number=decimals)} {which}."
        documents = comparison.runs[0].number("report", "held_out", "documents")
        if documents is not None and comparison.runs[0].part("report", "held_out", "unit") is None:  # else: windows
            caption = f"{decimals(documents)} documents: {caption}"
        if found.windows < 2:
            caption += f" There is {NO_INTERVAL}."
    blocks: list[Block] = [Table("", [*columns, *(column(m) for m in [*known, PERPLEXITY])], rows, caption)]
    if differences := _differences(comparison, known):
        blocks.append(differences)
    elif len(students) > 1:
        text = "Differences have no intervals here: they need an evaluation.json of each run, of the same data."
        blocks.append(Paragraph(text, aside=True))
    blocks.append(Notes(_notes(comparison, known), "How to read these numbers, and which of them are bounds"))
    return Section("Held-out data", blocks)


def _size(run: Run, who: str, speed: float | None) -> list[Cell]:
    numbers = (run.number(who, "parameters"), ""), (run.number(who, "bytes"), "B"), (speed, "")
    return [Cell(prefixed(number, unit)) for number, unit in numbers]


def _teachers(comparison: Comparison, known: Sequence[Measure]) -> Iterator[Row]:
    """A row for the teacher of each cache."""
    seen: set[str] = set()
    for run, _ in comparison.students:
        if run.evaluation is None or not run.evaluation.teacher.sums or run.evaluation.content in seen:
            continue
        seen.add(run.evaluation.content)
        found = run.evaluation.teacher_intervals()
        least = found["cross_entropy_at_least"]
        mean, half = with_half(*least)
        fixed = {name: Cell(text, tone="aside") for name, text in _ITSELF.items()}
        bound = "" if found["label_known"].mean == 1 else f"≥{THIN}"
        fixed["cross_entropy"] = Cell(f"{bound}{mean}", f"±{THIN}{half}" if half else "")
        cells = _size(run, "teacher", run.number("teacher", "positions_per_second"))
        cells += [fixed.get(m.name) or cell(m, found) for m in known]
        cells.append(Cell(f"{bound}{figures(math.exp(min(least.mean, 700.0)))}"))
        yield Row("teacher", cells, note="from its targets", series=Series("teacher", None))


def _differences(comparison: Comparison, known: Sequence[Measure]) -> Table | None:
    """Each run against what was trained beside it, and against the first run."""
    first, rows = comparison.runs[0], []
    for run, series in comparison.students:
        beside = (run.control, "its control"), (run.without_features, "the same without features")
        others = [(other, name) for other, name in beside if other is not None]
        others += [(first, first.name)] if run in comparison.runs[1:] else []
        for other, name in others:
            if found := paired_differences(run, other):
                cells = [cell(m, found, difference=True) for m in known]
                rows.append(Row(run.name, cells, f"against {name}", series))
    if not rows:
        return None
    words = comparison.words
    caption = (
        f"Paired over {words.windows}: what makes {words.one('window')} hard for every student cancels. A difference "
        "smaller than its 95% interval is no difference. Each student is one training run: these intervals do not "
        "include the effect of another seed."
    )
    return Table("difference", [column(m) for m in known], rows, caption)


def _notes(comparison: Comparison, known: Sequence[Measure]) -> list[tuple[str, str]]:
    """The meaning of the columns, and which numbers are bounds."""
    notes = [("±, ranges", f"95% intervals; {comparison.words.windows} are the independent units.")]
    notes += [(m.short, about(m, comparison.words, exact=comparison.exact)) for m in known]
    evaluation = comparison.evaluation
    if evaluation is None:
        return notes
    speed = ("speed", f"Student's forward during the evaluation, on {evaluation.device}.")
    each = (run.evaluation for run, _ in comparison.students)
    found = next((one.teacher_intervals() for one in each if one is not None and one.teacher.sums), {})
    if not found:
        return [*notes, speed]
    text = (
        f"What its targets know. {percent(found['label_known'].mean)} of the labels are among their entries, with "
        "their exact probability; any other label has at most the mass outside the entries, so the cross-entropy is a "
        "lower bound (≥). Its divergence from itself is 0."
    )
    if comparison.exact:
        text = f"Its targets hold every {comparison.words.outcome}: all is exact. Its divergence from itself is 0."
        return [*notes, ("teacher", text), speed]
    if "entropy_at_least" in found:
        low, high = (figures(found[f"entropy_at_{end}"].mean) for end in ("least", "most"))
        text += (
            f" {percent(found['tail_mass'].mean)} of its probability lies outside the top-k entries; its entropy is "
            f"between {low} and {high} nats."
        )
    return [*notes, ("teacher", text), speed]
