"""A plot of `fastkd sweep --auto`: every arm up to the rung where it fell."""

import math
import textwrap
from dataclasses import replace
from pathlib import Path

from ..evaluate.measures import MEASURES
from .auto_result import AutoReport
from .plot import drawn

PLOT = "auto.png"
_CHOSEN, _DEFAULT, _HARD, _REST = "#0b6e4f", "#0072b2", "#c44e00", "#9aa4ae"


def plot(report: AutoReport, path: Path) -> None:
    """Write the PNG. Raises ModuleNotFoundError if matplotlib is not installed."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(9.0, 5.4), dpi=160, layout="constrained")
    ax = figure.subplots()
    lines: dict[str, list[tuple[int, float]]] = {}
    for decision in report.decisions:
        for name, value, _ in decision.values:
            if value is not None:
                lines.setdefault(name, []).append((decision.step, value))
    styles = {report.hard: (_HARD, "--", 2.0, "hard labels alone"), report.default: (_DEFAULT, "-", 2.0, "default")}
    if report.chosen is not None:
        also = [styles[report.chosen][3]] if report.chosen in styles else []
        styles[report.chosen] = (_CHOSEN, "-", 3.0, ", ".join(["chosen", *also]))
    for name, points in lines.items():
        colour, dashes, width, says = styles.get(name, (_REST, "-", 1.0, ""))
        x, y = zip(*points, strict=True)
        label = f"{says}: {name}" if says else None
        ax.plot(x, y, dashes, color=colour, lw=width, label=label, zorder=3 if says else 2)
        end = "o" if name == report.chosen else "x"
        ax.plot(x[-1:], y[-1:], end, color=colour, ms=6, mew=1.6, zorder=4)
    steps = [decision.step for decision in report.decisions]
    for step in steps:
        ax.axvline(step, color="#e8e8e8", lw=1, zorder=0)
    ax.set_xscale("log", base=2)
    ax.set_xticks(steps, [str(step) for step in steps])
    ax.xaxis.set_minor_locator(NullLocator())
    measure = MEASURES.get(report.measure)
    unit = f" ({measure.unit})" if measure is not None and measure.scale == 1 else ""
    ax.set_ylabel(f"{measure.label if measure is not None else report.measure}{unit}, held out", fontsize=9)
    ax.set_xlabel("step (rungs; logarithmic)   x: where an arm fell   grey: the other arms", fontsize=9)
    ends = [y for points in lines.values() for _, y in points if math.isfinite(y)]
    if ends and min(ends) > 0 and max(ends) > 4 * min(ends):
        ax.set_yscale("log")
    ax.grid(axis="y", color="#f0f0f0")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False)
    title = report.why.partition(". ")[0] + f", among {report.rungs[0].arms} arms"
    figure.suptitle("\n".join(textwrap.wrap(title, 100)), fontsize=10, x=0.01, ha="left")
    figure.savefig(path, format="png")


def plotted(report: AutoReport) -> AutoReport:
    """The report with a plot, or with a note on why there is none."""
    path = Path(report.out) / PLOT
    note = drawn(lambda: plot(report, path))
    return replace(report, notes=[*report.notes, note]) if note else replace(report, plot=str(path))
