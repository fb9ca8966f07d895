"""A plot of a sweep: seeds and mean of each arm by the measure of the ranking."""

import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..evaluate.measures import MEASURES
from ..utils.words import KINDS
from .result import SweepReport

PLOT = "sweep.png"
_BEST, _ALIKE, _REST = "#0b6e4f", "#2f6f9f", "#767676"


def plot(report: SweepReport, path: Path) -> None:
    """Write the PNG. Raises ModuleNotFoundError if matplotlib is not installed."""
    from matplotlib.figure import Figure

    arms = [arm for arm in report.arms if not arm.diverged and not arm.stopped]
    figure = Figure(figsize=(9.0, 2.0 + 0.34 * len(arms)), dpi=160, layout="constrained")
    ax = figure.subplots()
    for row, arm in enumerate(arms):
        color, marker = (_BEST, "D") if arm.name == report.best else (_REST, "s")
        if arm.name in report.alike:
            color, marker = _ALIKE, "o"
        values, half = arm.values[report.measure], arm.behind.half if arm.behind else None
        ax.errorbar(arm.mean(report.measure), row, xerr=half, fmt="|", ms=14, mew=2, lw=1, color=color)
        ax.plot(values, [row] * len(values), marker, ms=5, alpha=0.5, mew=0, color=color)
    ax.axvline(arms[0].mean(report.measure), color=_BEST, lw=1, ls="--", zorder=0)
    ax.set_yticks(range(len(arms)), [arm.name for arm in arms], fontsize=9)
    ax.invert_yaxis()
    measure = MEASURES[report.measure]
    unit = f" ({measure.unit})" if measure.scale == 1 else ""  # fractions are not scaled to percent
    ax.set_xlabel(f"{measure.label}{unit}", fontsize=9)
    key = "bar: mean over seeds   marker: a seed (diamond: the best, circle: not distinguishable, square: worse)\n"
    key += f"line: 95% interval of the distance to the best, of seeds or of {KINDS[report.kind].windows}, the wider"
    figure.supxlabel(key, fontsize=8, x=0.01, ha="left")
    ax.grid(axis="x", color="#e8e8e8")
    ax.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle("\n".join(textwrap.wrap(report.verdict, 110)), fontsize=10, x=0.01, ha="left")
    figure.savefig(path, format="png")


def plotted(report: SweepReport) -> SweepReport:
    """The report with a plot, or with a note on why there is none."""
    if report.best is None:
        return report
    path = Path(report.out) / PLOT
    note = drawn(lambda: plot(report, path))
    return replace(report, notes=[*report.notes, note]) if note else replace(report, plot=str(path))


def drawn(draw: Callable[[], None]) -> str:
    """Draw a plot. Returns a note if matplotlib is not installed, else an empty text."""
    try:
        draw()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        return "no plot: matplotlib is not installed. pip install 'fastkd[report]', and the same command draws it."
    return ""
