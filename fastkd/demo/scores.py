"""The table of teacher and students on the held-out windows, and their differences in pairs, as text."""

from collections.abc import Iterator, Sequence
from typing import Any

from ..evaluate.measures import DEMO, printed_in
from ..report.comparison import paired_differences
from ..report.runs import Run
from ..utils.intervals import Interval, to_json

_NAME, _WIDTH = 20, 19


def everyone(runs: Sequence[Run]) -> Iterator[Run]:
    """Each run, and then its control."""
    for run in runs:
        yield run
        if run.control is not None:
            yield run.control


def pairs(runs: Sequence[Run]) -> Iterator[tuple[str, dict[str, Interval]]]:
    """What is held against what: each run against its control, and against the control of the first one."""
    control = runs[0].control
    assert control is not None
    for run in runs:
        if run.control is not None:
            yield f"{run.name} - control", paired_differences(run, run.control)
        elif run.steps:
            yield f"{run.name} - control", paired_differences(run, control)


def scores_text(runs: Sequence[Run]) -> list[str]:
    """The lines of the table."""
    found = runs[0].evaluation
    assert found is not None
    of = found.teacher_intervals()
    lines = [
        f"{f'{found.windows} held-out windows':<{_NAME}}" + "".join(f"{m.short:>{_WIDTH}}" for m in printed_in(DEMO))
    ]
    least = f"≥ {of['cross_entropy_at_least'].mean:.3f}"
    lines.append(f"{'  teacher':<{_NAME}}{least:>{_WIDTH}}{'0':>{_WIDTH}}{'100%':>{_WIDTH}}")
    for run in sorted(everyone(runs), key=lambda run: bool(run.steps)):  # the damaged student comes first
        lines.append(_line(run.name.rpartition(", ")[2], run.measures, sign=""))
    lines += [_line(name, difference, sign="+") for name, difference in pairs(runs)]
    return lines


def scores_json(run: Run) -> dict[str, Any]:
    """A run's measures, with the ends of their intervals."""
    return {name: to_json(found) for name, found in run.measures.items()}


def _line(name: str, found: Any, *, sign: str) -> str:
    cells = []
    for measure in printed_in(DEMO):
        mean, half = (x * measure.scale for x in found[measure.name])
        unit, places = measure.unit.removeprefix("nats"), measure.decimals
        cells.append(f"{mean:{sign}.{places}f}{unit}" + (f" ± {half:.{places}f}{unit}" if sign else ""))
    return f"{'  ' + name:<{_NAME}}" + "".join(f"{cell:>{_WIDTH}}" for cell in cells)
