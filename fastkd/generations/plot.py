"""A plot of several generations: the measure that decides, of each student, and its difference from the control."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..evaluate.measures import MEASURES
from ..train.verdict import EVEN, HELPED, NOT_KNOWN, verdict
from ..utils.intervals import Interval
from ..utils.words import KINDS, counted
from .result import BEFORE, CONTROL, GenerationsReport

PLOT = "generations.png"
_COLOR = {HELPED: "#0b6e4f", EVEN: "#767676", NOT_KNOWN: "#767676"}
_WORSE, _PLAIN = "#b3401f", "#2f6f9f"


def plot(report: GenerationsReport, path: Path) -> None:
    """Write the PNG. Raises ModuleNotFoundError if matplotlib is not installed."""
    from matplotlib.figure import Figure

    measure = MEASURES.get(report.measure)
    label = report.measure if measure is None else measure.label
    members = [member for member in report.members if report.measure in member.values]
    other = CONTROL if any(CONTROL in member.against for member in members) else BEFORE
    figure = Figure(figsize=(9.5, 1.9 + 0.42 * len(members)), dpi=160, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    words = KINDS[report.kind]
    for row, member in enumerate(members):
        _point(left, row, member.values[report.measure], _PLAIN)
        if (difference := _of(member.against.get(other), report.measure)) is not None:
            _point(right, row, difference, _COLOR.get(verdict(report.measure, difference), _WORSE))
    right.axvline(0, color="#555555", lw=1, ls="--", zorder=0)
    left.set_yticks(range(len(members)), [member.name for member in members], fontsize=9)
    left.invert_yaxis()
    left.set_xlabel(f"{label}, 95% interval over {words.windows}", fontsize=9)
    against = "the control" if other == CONTROL else "the generation before"
    right.set_xlabel(f"minus {against}, paired by {words.window}", fontsize=9)
    for ax in (left, right):
        ax.grid(axis="x", color="#e8e8e8")
        ax.tick_params(axis="x", labelsize=8)
        ax.spines[["top", "right", "left"]].set_visible(False)
    right.tick_params(axis="y", length=0)
    held_out = counted(report.windows, f"held-out {words.window}")
    title = f"{report.generations} generations, each the teacher of the next; {held_out}"
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.supxlabel("green: better   gray: no difference   red: worse   one seed each", fontsize=8, x=0.01, ha="left")
    figure.savefig(path, format="png")


def _point(ax: Any, row: int, value: Interval, color: str) -> None:
    half = value.half if value.known else None
    ax.errorbar(value.mean, row, xerr=half, fmt="o", ms=6, lw=1.5, capsize=3, color=color)


def _of(found: Mapping[str, Interval] | None, measure: str) -> Interval | None:
    return None if found is None else found.get(measure)


def plotted(report: GenerationsReport) -> GenerationsReport:
    """The report with a plot, or with a note on why there is none."""
    if not any(report.measure in member.values for member in report.members):
        return report
    path = Path(report.out) / PLOT
    try:
        plot(report, path)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        note = "no plot: matplotlib is not installed. pip install 'fastkd[report]', and the same command draws it."
        return replace(report, notes=[*report.notes, note])
    return replace(report, plot=str(path))
