"""A plot of a sweep: seeds and mean of each arm, by the measure of the ranking and by a second one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..evaluate.measures import MEASURES
from .result import ArmResult, SweepReport

PLOT = "sweep.png"
_BEST, _ALIKE, _REST, _INK = "#0b6e4f", "#2f6f9f", "#767676", "#222222"
_BESIDE = ("kl_sampled", "kl_bucket", "cross_entropy")


def plot(report: SweepReport, path: Path) -> None:
    """Write the PNG. Raises ModuleNotFoundError if matplotlib is not installed."""
    from matplotlib.figure import Figure

    arms = [arm for arm in report.arms if not arm.diverged]
    beside = next((n for n in _BESIDE if n != report.measure and all(n in arm.values for arm in arms)), None)
    measures = [report.measure] + ([beside] if beside else [])
    names = [_name(arm) for arm in arms]
    # wide enough for the longest name, and for the title
    width = max(0.075 * max(map(len, names)) + 0.4 + 3.9 * len(measures), 8.2)
    figure = Figure(figsize=(width, 2.0 + 0.34 * len(arms)), dpi=160, layout="constrained")
    axes: Any = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for number, (ax, measure) in enumerate(zip(axes, measures, strict=True)):
        _panel(ax, arms, report, measure, ranks=number == 0)
    axes[0].set_yticks(range(len(arms)), names, fontsize=9)
    axes[0].set_ylim(len(arms) - 0.4, -0.6)
    for label, arm in zip(axes[0].get_yticklabels(), arms, strict=True):
        label.set_color(_color(arm, report))
    figure.suptitle(_title(report, arms), fontsize=10.5, x=0.01, ha="left", color=_INK)
    key = "dot: a seed   bar: mean over seeds"
    if any(_half(arm) for arm in arms):
        key += "   line: 95% interval of the distance to the best, of seeds or of windows, the wider"
    if report.alike:
        key += "   blue: not distinguishable"
    figure.supxlabel(key, fontsize=8, x=0.01, ha="left", color="#666666")
    figure.savefig(path, format="png")


def _panel(ax: Any, arms: "list[ArmResult]", report: SweepReport, measure: str, *, ranks: bool) -> None:
    """One measure. ranks: it is the measure of the ranking, with intervals: an arm whose line does not reach the best's
    mean is distinguishable from it."""
    if ranks:
        ax.axvline(arms[0].mean(measure), color=_BEST, lw=1, ls=(0, (3, 3)), alpha=0.8, zorder=1)
    for place, arm in enumerate(arms):
        color, values, mean = _color(arm, report), arm.values[measure], arm.mean(measure)
        if ranks and (half := _half(arm)):
            ax.plot([mean - half, mean + half], [place, place], "-", lw=1.1, color=color, alpha=0.8, zorder=2)
        ax.plot(values, [place] * len(values), "o", ms=5.5, color=color, alpha=0.5, mew=0, zorder=3)
        ax.plot([mean, mean], [place - 0.28, place + 0.28], "-", lw=2.2, color=color, zorder=4)
    of = MEASURES[measure]
    unit = f" ({of.unit})" if of.scale == 1 else ""  # fractions are not scaled to percent
    ax.set_xlabel(of.label + unit, fontsize=9, color=_INK)
    ax.tick_params(axis="x", labelsize=8)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color="#e8e8e8", lw=0.8)
    ax.set_axisbelow(True)
    ax.margins(x=0.06)
    ax.locator_params(axis="x", nbins=6)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)


def _half(arm: ArmResult) -> float | None:
    """The wider of the two intervals of the distance to the best; None if one is unknown."""
    if arm.behind is None or arm.behind.by_seeds is None or arm.behind.by_windows is None:
        return None
    return max(arm.behind.by_seeds, arm.behind.by_windows)


def _title(report: SweepReport, arms: "list[ArmResult]") -> str:
    best = _name(arms[0])
    if report.margin is None:
        return f"{best}: the only arm"
    count = len(report.alike)
    others = (
        f"{count} other{'s' * (count > 1)} not distinguishable from it" if count else "distinguishable from all others"
    )
    return f"Best: {best}\n{report.margin.distance:.4f} ahead of the next; {others}"


def _name(arm: ArmResult) -> str:
    return "  ".join(f"{name} {value:g}" if isinstance(value, float) else value for name, value in arm.changes.items())


def _color(arm: ArmResult, report: SweepReport) -> str:
    return _BEST if arm.name == report.best else _ALIKE if arm.name in report.alike else _REST


def plotted(report: SweepReport) -> SweepReport:
    """The report with a plot, or with a note on why there is none."""
    if report.best is None:
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
