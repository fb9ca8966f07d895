"""Charts by matplotlib: as SVG with the page's colours, and as PNG.

In the SVG, colours are the CSS variables of the page, so that one drawing serves a light and a dark page. They are
distinguishable for the colour-blind (Okabe and Ito, 2008; made darker or lighter for the background); controls are
also dashed.
"""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import ReportError
from .page import Chart, Line, Series

# light, dark: blue, vermilion, green, purple, orange, sky
COLOURS = (
    ("#0072b2", "#4aa8e0"),
    ("#c44e00", "#f08a4b"),
    ("#00805c", "#2fc49a"),
    ("#a8467f", "#dd93bd"),
    ("#a87400", "#e6b04a"),
    ("#2a8fc4", "#8ccdf0"),
)
INK, GRID, GREY = ("#1c2126", "#e4e8ec"), ("#dfe3e8", "#30363d"), ("#68727d", "#98a2ad")
_POINTS = 240  # maximum of a line; more are averaged in groups
_SIZE = (4.5, 2.9)  # inches of 72 points

_PLACEHOLDERS = {  # colours that are drawn, and what replaces them in the SVG
    **{f"#0a00{i:02x}": f"var(--s{i})" for i in range(len(COLOURS))},
    "#0b0001": "var(--ink)",
    "#0b0002": "var(--grid)",
    "#0b0003": "var(--grey)",
}


def svg(chart: Chart) -> str:
    """The chart as an SVG element for HTML; its text stays text. Raises ReportError if matplotlib is not installed."""
    placeholders = list(_PLACEHOLDERS)
    with _style(chart.name):
        figure = _draw(chart, placeholders[:-3], *placeholders[-3:])
        buffer = io.StringIO()
        nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # within HTML it needs no namespaces, and nothing that looks like an address; its font is the page's
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"| (width|height)="[^"]*pt"', "", text, count=4)
    text = text.replace(" font-family: 'DejaVu Sans', sans-serif;", "")
    for colour, variable in _PLACEHOLDERS.items():
        text = text.replace(colour, variable)
    # ids of several charts would collide, except those that are referred to: hashes that include the chart's name
    used = set(re.findall(r"#([\w.]+)", text))
    return re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)


def png(chart: Chart) -> bytes:
    """The chart as a PNG on white, with title and legend."""
    with _style(chart.name):
        figure = _draw(chart, [light for light, _ in COLOURS], INK[0], GRID[0], GREY[0], alone=True)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def legend(charts: Sequence[Chart]) -> list[Series]:
    """The distinct series of some charts, in order."""
    return list(dict.fromkeys(line.series for chart in charts for line in chart.lines))


@contextmanager
def _style(salt: str) -> Iterator[None]:
    """matplotlib's settings for these charts, without warnings about characters that its font lacks."""
    try:
        import matplotlib
    except ImportError as error:
        raise ReportError(
            "matplotlib is not installed; charts are drawn with it. Use pip install 'fastkd[report]'."
        ) from error
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "text.parse_math": False,
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 10,
        "axes.unicode_minus": True,
        "axes.formatter.limits": (-4, 5),
        "axes.formatter.useoffset": False,
        "path.simplify": True,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _draw(chart: Chart, colours: Sequence[str], ink: str, grid: str, grey: str, *, alone: bool = False) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(grey)
    axes.tick_params(colors=ink, length=0, labelsize=9.5)
    axes.tick_params(axis="x", length=3, color=grey)
    axes.grid(axis="both" if chart.diagonal else "y", color=grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(chart.x_label, color=ink)
    axes.set_ylabel(chart.y_label, color=ink)
    if chart.diagonal:
        axes.plot([0, 1], [0, 1], color=grey, linewidth=1, linestyle=(0, (1, 2)))
    if chart.level is not None:
        axes.axhline(chart.level[0], color=grey, linewidth=1.2, linestyle=(0, (1, 2)))
    for line in chart.lines:
        colour = grey if line.series.colour is None else colours[line.series.colour % len(colours)]
        x, y, band = _thinned(line)
        if band is not None:
            axes.fill_between(x, *band, color=colour, alpha=0.16, linewidth=0)
        axes.plot(
            x,
            y,
            color=colour,
            linewidth=1.8,
            linestyle=(0, (4, 1.6)) if line.series.dashed else "-",
            marker="o" if line.markers else None,
            markersize=4,
            solid_capstyle="round",
            label=line.series.name,
        )
    for x_at, y_at, words in chart.marks:
        axes.plot([x_at], [y_at], marker="o", markersize=7, markerfacecolor="none", color=ink)
        axes.annotate(words, (x_at, y_at), xytext=(8, -14), textcoords="offset points", color=ink, fontsize=9.5)
    axes.margins(x=0.02, y=0.08)
    if chart.from_zero:
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
    if chart.log:
        _logarithmic(axes, chart)
    else:
        axes.locator_params(axis="both", nbins=6)
    if not chart.log and all(float(x).is_integer() for line in chart.lines for x in line.x):
        locator: Any = axes.xaxis.get_major_locator()
        locator.set_params(integer=True)
    if chart.level is not None:
        axes.text(
            0.995, chart.level[0], chart.level[1], transform=axes.get_yaxis_transform(), ha="right", va="bottom",
            color=grey, fontsize=9.5,
        )  # fmt: skip
    if alone:
        axes.set_title(chart.title, color=ink, fontsize=11, loc="left")
        if chart.lines:
            # a long name may extend beyond the plot, and must not shrink it
            axes.legend(frameon=False, fontsize=9, labelcolor=ink).set_in_layout(False)
    return figure


def _logarithmic(axes: Any, chart: Chart) -> None:
    """Both axes; ticks at the points on x, at 1, 2, 5 and 10 on y."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_xscale("log")
    axes.set_yscale("log")
    at = sorted({float(x) for line in chart.lines for x in line.x})
    axes.set_xticks(at, labels=[f"{x:g}" for x in at])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())


def _thinned(line: Line) -> tuple[list[float], list[float], tuple[list[float], list[float]] | None]:
    """x, y and band of a line: at most `_POINTS` points, each the mean of a group; all points of a line with a band."""
    x, y = list(map(float, line.x)), list(map(float, line.y))
    if line.band is not None:
        return x, y, (list(map(float, line.band[0])), list(map(float, line.band[1])))
    if len(x) <= _POINTS:
        return x, y, None
    size = -(-len(x) // _POINTS)
    groups = [slice(i, i + size) for i in range(0, len(x), size)]
    return [sum(x[g]) / len(x[g]) for g in groups], [sum(y[g]) / len(y[g]) for g in groups], None
