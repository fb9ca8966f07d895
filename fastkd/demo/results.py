"""Results of the demos: measures as a table of text, and measured values against their targets."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..evaluate.measures import DEMO, Measure, printed_in
from ..report.comparison import paired_differences
from ..report.page import Cell, Column, Row, Section, Table
from ..report.runs import Run
from ..utils.intervals import Interval
from ..utils.text import format_table

Scores = Mapping[str, Interval]


@dataclass(frozen=True)
class Target:
    """A measured value and its upper limit, as numbers and as text."""

    name: str
    value: float
    limit: float
    text: str
    limit_text: str

    @property
    def met(self) -> bool:
        """Whether the value is within the limit."""
        return self.value <= self.limit

    def to_json(self) -> dict[str, Any]:
        """All fields, and whether the target is met."""
        return asdict(self) | {"met": self.met}


def targets_of(*, overhead: float, step: float, runs: Sequence[Run], bytes_per_position: float) -> list[Target]:
    """The four targets. runs: the trained ones."""
    waiting = max(run.waiting for run in runs if run.waiting is not None)
    return [
        Target("capture over the bare teacher", overhead, 1.08, f"{overhead:.3f}", "1.08"),
        Target("share of training that waited for data", waiting, 0.01, f"{waiting:.2%}", "1%"),
        Target("a step over one of cross-entropy alone", step, 1.05, f"{step:.3f}", "1.05"),
        Target("bytes a position", bytes_per_position, 108.0, f"{bytes_per_position:.1f}", "108"),
    ]


def targets_text(targets: Sequence[Target]) -> list[str]:
    """A line per target."""
    rows = [(f"  {t.name}", t.text, t.limit_text, "ok" if t.met else "MISSED") for t in targets]
    return format_table([("", "measured", "at most"), *rows])


def targets_section(targets: Sequence[Target]) -> Section:
    """The targets as a section of the report."""
    rows = []
    for t in targets:
        tone, mark = ("good", "met") if t.met else ("bad", "missed")
        rows.append(Row(t.name, [Cell(t.text, tone=tone, mark=mark), Cell(t.limit_text)]))
    return Section("Targets", [Table("", [Column("measured"), Column("at most")], rows)])


def students_of(runs: Sequence[Run]) -> Iterator[Run]:
    """Each run, and then its control."""
    for run in runs:
        yield run
        if run.control is not None:
            yield run.control


def differences_to_control(runs: Sequence[Run]) -> dict[str, Scores]:
    """Paired differences of each trained run to its control, or else to that of the first run."""
    first = runs[0].control
    return {f"{run.name} - control": paired_differences(run, run.control or first) for run in runs if run.steps}


def scores_of(runs: Sequence[Run]) -> list[str]:
    """The table of teacher and students, and of the differences to the control."""
    evaluation = runs[0].evaluation
    assert evaluation is not None
    teacher = evaluation.teacher_intervals()
    teacher |= {"≥ cross_entropy": teacher["cross_entropy_at_least"]}
    teacher |= {"kl_bucket": Interval(0.0, 0.0), "agreement": Interval(1.0, 0.0)}
    students = {
        run.name.rpartition(", ")[2]: run.measures
        for run in sorted(students_of(runs), key=lambda run: bool(run.steps))  # the pruned student is first
    }
    heading = f"{evaluation.windows} held-out windows"
    return scores_table(heading, {"teacher": teacher} | students, differences_to_control(runs), printed_in(DEMO))


def scores_table(
    heading: str, rows: Mapping[str, Scores], differences: Mapping[str, Scores], measures: Sequence[Measure]
) -> list[str]:
    """A row per model and per difference, a column per measure."""
    lines = [(heading, *(measure.short for measure in measures))]
    lines += [(f"  {name}", *(_score(found, m) for m in measures)) for name, found in rows.items()]
    lines += [(f"  {name}", *(_score(found, m, "+") for m in measures)) for name, found in differences.items()]
    return format_table(lines)


def _score(found: Scores, measure: Measure, sign: str = "") -> str:
    """A measure with its interval; empty if it was not measured. A lower bound is under its name after a "≥"."""
    bound = "" if measure.name in found else "≥ "
    if bound + measure.name not in found:
        return ""
    mean, half = (value * measure.scale for value in found[bound + measure.name])
    unit, places = measure.unit.removeprefix("nats"), measure.decimals
    return f"{bound}{mean:{sign}.{places}f}{unit}" + (f" ± {half:.{places}f}{unit}" if half else "")
