"""Curves of the training: losses, schedules, held-out measures at each evaluation, and calibration."""

import math

from ...evaluate.measures import Measure
from ..measures import MEASURES
from ..page import Chart, Charts, Line, Paragraph, Section, Series
from ..runs import Comparison, Run

POSITION = 20
_LOSSES = (
    ("loss", "Training loss",
     "The minimized loss: α · hard + (1 − α) · T² · soft. Runs of different α or T: compare the parts."),
    ("soft", "Soft loss", "Divergence from the teacher; lower is better."),
    ("hard", "Hard loss", "Cross-entropy on the labels of the training data; lower is better."),
)  # fmt: skip
_SCHEDULES = (
    ("rate", "Learning rate", "learning rate"),
    ("alpha", "α, weight of the hard loss", "α"),
    ("temperature", "Temperature", "T"),
    ("grad_norm", "Gradient norm", "norm"),
)


def build(comparison: Comparison) -> Section:
    """All curves that were logged."""
    charts: list[Chart] = []
    for name, title, caption in _LOSSES:
        if lines := _logged(comparison, name):
            unit = f"nats per {comparison.words.position}"
            charts.append(Chart(f"training-{name}", title, caption, "step", unit, lines))
    for measure in (one for one in MEASURES.values() if one.name in comparison.measures):
        lines = [line for run, series in comparison.students for line in _held_out(run, series, measure)]
        if any(len(line.x) > 1 for line in lines):  # of one evaluation, the table above has all
            caption = f"Held out; {measure.better} is better."
            if any(line.band is not None for line in lines):
                caption += " Bands: 95% intervals of each student by itself, wider than those of paired differences."
            level = _teacher_level(comparison, measure)
            title = f"Held out: {measure.short}"
            y_label = f"{measure.short}, {measure.unit}"
            charts.append(Chart(f"held-out-{measure.name}", title, caption, "step", y_label, lines, level))
    if lines := _calibration(comparison):
        caption = "On the dotted line a model is right as often as it is confident; below it, it is overconfident."
        axes = "confidence, share of 1", "accuracy, share of 1"
        charts.append(Chart("reliability", "Calibration", caption, *axes, lines, diagonal=True))
    if not charts:
        return Section("Training curves", [Paragraph("These runs have no metrics.jsonl: nothing was logged.")])
    for name, title, unit in _SCHEDULES:
        lines = _logged(comparison, name)
        if any(len(set(line.y)) > 1 for line in lines):  # constants are among the settings
            charts.append(Chart(f"training-{name}", title, "Value at each step.", "step", unit, lines))
    return Section("Training curves", [Charts(charts)])


def _logged(comparison: Comparison, name: str) -> list[Line]:
    return [Line(series, *points) for run, series in comparison.students if (points := run.logged(name))[0]]


def _held_out(run: Run, series: Series, measure: Measure) -> list[Line]:
    """The measure at each evaluation of a run, as at most one line."""
    points = [(p.step, p.measures[measure.name]) for p in run.points if measure.name in p.measures]
    if not points:
        return []
    y, low, high = ([measure.scale * getattr(value, end) for _, value in points] for end in ("mean", "low", "high"))
    band = (low, high) if all(math.isfinite(value.half) for _, value in points) else None
    return [Line(series, [step for step, _ in points], y, band, markers=True)]


def _teacher_level(comparison: Comparison, measure: Measure) -> tuple[float, str] | None:
    found = comparison.evaluation.teacher_intervals() if comparison.evaluation is not None else {}
    key, name = measure.name, "teacher"
    if measure.name == "cross_entropy":
        exact = "label_known" in found and found["label_known"].mean == 1
        key, name = "cross_entropy_at_least", "teacher" if exact else "teacher, at least"
    return (measure.scale * found[key].mean, name) if key in found else None


def _calibration(comparison: Comparison) -> list[Line]:
    """Accuracy by confidence of the teacher and of each student."""
    lines: list[Line] = []
    for run, series in comparison.students:
        if run.evaluation is None:
            continue
        both = [(Series("teacher", None), run.evaluation.teacher)] if not lines else []
        for name, windows in [*both, (series, run.evaluation.student)]:
            if bins := windows.reliability():
                x, y = ([b[axis] for b in bins] for axis in ("confidence", "accuracy"))
                lines.append(Line(name, x, y, markers=True))
    return lines
