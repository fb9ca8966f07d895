"""Results of the demos: measures as a table of text, and measured values against their targets."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..evaluate.measures import Measure
from ..report.runs import Run, paired_differences
from ..utils.intervals import Interval
from ..utils.text import format_table

Scores = Mapping[str, Interval]


class Target(NamedTuple):
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


def scores_of(runs: Sequence[Run]) -> dict[str, Scores]:
    """The measures of the teacher and of each student. Where the cache does not know all labels, the teacher's
    cross-entropy is a lower bound, under the name "≥ cross_entropy"."""
    evaluation = runs[0].evaluation
    assert evaluation is not None
    teacher = evaluation.teacher_intervals()
    bound = "cross_entropy" if teacher["label_known"].mean == 1 else "≥ cross_entropy"
    teacher |= {bound: teacher["cross_entropy_at_least"], "kl_bucket": Interval(0.0, 0.0)}
    teacher["agreement"] = Interval(1.0, 0.0)
    # a student that was not trained is first
    students = sorted((student for run in runs for student in run.students), key=lambda run: bool(run.steps))
    return {"teacher": teacher} | {run.name.rpartition(", ")[2]: run.measures for run in students}


def paired(runs: Sequence[Run]) -> dict[str, Scores]:
    """Paired differences of each trained run: to its control, or else to that of the first run, and to the same without
    features, if there is one."""
    first = runs[0].control
    found: dict[str, Scores] = {}
    for run in (run for run in runs if run.steps):
        if run.without_features is not None:
            found[f"{run.name} - without features"] = paired_differences(run, run.without_features)
        found[f"{run.name} - control"] = paired_differences(run, run.control or first)
    return found


def scores_table(runs: Sequence[Run], measures: Sequence[Measure], of: str) -> list[str]:
    """A row for the teacher, for each student and for each difference, a column per measure. of: the windows' name."""
    evaluation = runs[0].evaluation
    assert evaluation is not None
    lines = [(f"{evaluation.windows} {of}", *(measure.short for measure in measures))]
    for sign, rows in (("", scores_of(runs)), ("+", paired(runs))):
        lines += [(f"  {name}", *(_score(found, m, sign) for m in measures)) for name, found in rows.items()]
    return format_table(lines)


def _score(found: Scores, measure: Measure, sign: str) -> str:
    """A measure with its interval; empty if it was not measured. A lower bound is under its name after a "≥"."""
    bound = "" if measure.name in found else "≥ "
    if bound + measure.name not in found:
        return ""
    mean, half = (value * measure.scale for value in found[bound + measure.name])
    unit, places = measure.unit.removeprefix("nats"), measure.decimals
    return f"{bound}{mean:{sign}.{places}f}{unit}" + (f" ± {half:.{places}f}{unit}" if half else "")
