"""Charts by matplotlib: as SVG with the page's colours, and as PNG.

In the SVG, colours are the CSS variables of the page, so that one drawing serves a light and a dark page. They are
distinguishable for the colour-blind (Okabe and Ito, 2008; made darker or lighter for the background). Each line also
has a marker of its own, so that a page printed in grey can be read; controls are dashed.
"""

import io
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any, NamedTuple

from ..errors import ReportError
from .page import Chart, Series

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
_LARGEST = 1e100  # matplotlib fails on differences that overflow
_SIZE = (4.5, 2.9)  # inches of 72 points
_ROW = 0.3  # inches of a spread
_MARKERS = "osD^vP"
_DASHES: tuple[Any, ...] = ("-", (0, (7, 1.6, 1.2, 1.6)), (0, (1.2, 1.2)), (0, (7, 1.6, 1.2, 1.6, 1.2, 1.6)))
_CONTROL, _REFERENCE = (0, (4, 1.6)), (0, (3, 2))


class Style(NamedTuple):
    """How a series is drawn. colour: index into COLOURS, None for grey. marker: of matplotlib. dashes: "-" for a solid
    line, else (0, lengths of strokes and gaps in widths of the line)."""

    colour: int | None
    marker: str
    dashes: Any


def style_of(series: Series) -> Style:
    """The style of a series. References are grey and broken. Of the others, the first six differ by colour and marker,
    those after them by dashes as well, and by another pairing of both."""
    if series.colour is None:
        return Style(None, "x", _REFERENCE)
    turn, colour = divmod(series.colour, len(COLOURS))
    return Style(colour, _MARKERS[(colour + turn) % len(_MARKERS)], _CONTROL if series.dashed else _DASHES[turn % 4])


_PLACEHOLDERS = {  # colours that are drawn, and what replaces them in the SVG
    **{f"#0a00{i:02x}": f"var(--s{i})" for i in range(len(COLOURS))},
    "#0b0001": "var(--ink)",
    "#0b0002": "var(--grid)",
    "#0b0003": "var(--grey)",
}


def svg(chart: Chart) -> str:
    """The chart as an SVG element for HTML; its text stays text. Raises ReportError if matplotlib is not installed."""
    buffer, placeholders = io.StringIO(), list(_PLACEHOLDERS)
    with _drawn(chart, placeholders[:-3], *placeholders[-3:]) as figure:
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
    buffer = io.BytesIO()
    with _drawn(chart, [light for light, _ in COLOURS], INK[0], GRID[0], GREY[0]) as figure:
        (axes,) = figure.axes
        axes.set_title(chart.title)
        if chart.lines:
            # a long name may extend beyond the plot, and must not shrink it
            axes.legend().set_in_layout(False)
        figure.savefig(buffer, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


@contextmanager
def _drawn(chart: Chart, colours: Sequence[str], ink: str, grid: str, grey: str) -> Iterator[Any]:
    """The chart as a figure of matplotlib, to be saved within the context: its settings hold there only."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ReportError(
            "matplotlib is not installed; charts are drawn with it. Use pip install 'fastkd[report]'."
        ) from error
    settings = {
        "svg.fonttype": "none", "svg.hashsalt": chart.name, "text.parse_math": False,
        "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 10,
        "figure.figsize": _SIZE, "figure.constrained_layout.use": True,
        "axes.facecolor": "none", "axes.edgecolor": grey, "axes.labelcolor": ink, "axes.unicode_minus": True,
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
        "axes.xmargin": 0.02, "axes.ymargin": 0.08,
        "axes.formatter.limits": (-4, 5), "axes.formatter.useoffset": False,
        "axes.titlelocation": "left", "axes.titlesize": 11, "axes.titlecolor": ink,
        "axes.grid": True, "axes.grid.axis": "both" if chart.diagonal else "y", "axes.axisbelow": True,
        "grid.color": grid, "grid.linewidth": 0.8,
        "xtick.color": grey, "xtick.labelcolor": ink, "xtick.labelsize": 9.5, "xtick.major.size": 3,
        "ytick.labelcolor": ink, "ytick.labelsize": 9.5, "ytick.major.size": 0,
        "legend.frameon": False, "legend.fontsize": 9, "legend.labelcolor": ink,
        "lines.linewidth": 1.8, "lines.markersize": 4, "lines.solid_capstyle": "round",
    }  # fmt: skip
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(_SIZE[0], 1.0 + _ROW * len(chart.spreads))) if chart.spreads else Figure()
        _draw(figure.add_subplot(), chart, colours, ink, grey)
        yield figure


def _draw(axes: Any, chart: Chart, colours: Sequence[str], ink: str, grey: str) -> None:
    from matplotlib.ticker import LogLocator

    axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
    dotted: dict[str, Any] = {"color": grey, "linestyle": (0, (1, 2))}
    if chart.diagonal:
        axes.plot([0, 1], [0, 1], linewidth=1, **dotted)
    if chart.level is not None:
        axes.axhline(_drawable(chart.level[0]), linewidth=1.2, **dotted)
    for number, line in enumerate(chart.lines):
        how = style_of(line.series)
        colour = grey if how.colour is None else colours[how.colour]
        size = 1 if line.band is not None else max(1, -(-len(line.x) // _POINTS))
        x, y, *band = (
            [fmean(_drawable(value) for value in of[i : i + size]) for i in range(0, len(of), size)]
            for of in (line.x, line.y, *(line.band or ()))
        )
        if band:
            axes.fill_between(x, *band, color=colour, alpha=0.16, linewidth=0)
        alone, reference = len(line.x) == 1, how.colour is None
        marked = alone or (line.markers and not reference)
        style: dict[str, Any] = {"linestyle": how.dashes, "marker": how.marker if marked else None}
        style |= {"markersize": 8} if alone else {}
        if not marked and not reference and len(chart.lines) > 1:  # a few, to tell lines apart without colours
            style |= {"marker": how.marker, "markevery": (0.05 + 0.04 * number % 0.2, 0.25), "markersize": 5}
        # the first lines are those that a reader looks for: above the others
        axes.plot(x, y, color=colour, label=line.series.name, zorder=3 - 0.01 * number, **style)
    for row, spread in enumerate(chart.spreads):
        how = style_of(spread.series)
        colour = grey if how.colour is None else colours[how.colour]
        half = spread.half
        axes.errorbar(
            [spread.mean], [row], xerr=half, fmt="|", ms=13, mew=2.2, lw=1.2, color=colour, label=spread.series.name
        )
        axes.plot(spread.values, [row] * len(spread.values), how.marker, ms=5, alpha=0.65, mew=0, color=colour)
    if chart.spreads:
        axes.set_yticks(
            range(len(chart.spreads)), [textwrap.fill(one.series.name, 24) for one in chart.spreads], fontsize=8
        )
        axes.set_ylim(len(chart.spreads) - 0.4, -0.6)
        axes.axvline(chart.spreads[0].mean, linewidth=1, zorder=0, **dotted)
        axes.grid(axis="x")
    for x_at, y_at, words in chart.marks:
        axes.plot([x_at], [y_at], marker="o", markersize=7, markerfacecolor="none", color=ink)
        axes.annotate(words, (x_at, y_at), xytext=(8, -14), textcoords="offset points", color=ink, fontsize=9.5)
    if chart.from_zero:
        axes.set(xlim=(0, None), ylim=(0, None))
    if chart.log:
        at = sorted({float(x) for line in chart.lines for x in line.x})
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(at, labels=[f"{x:g}" for x in at])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
    elif chart.spreads:
        axes.locator_params(axis="x", nbins=5)
    else:
        axes.locator_params(axis="both", nbins=6)
        if all(float(x).is_integer() for line in chart.lines for x in line.x):
            axes.xaxis.get_major_locator().set_params(integer=True)
    if chart.level is not None:
        level, label = chart.level
        axes.text(
            0.995, _drawable(level), label, transform=axes.get_yaxis_transform(), ha="right", va="bottom", color=grey,
            fontsize=9.5,
        )  # fmt: skip


def alternative(chart: Chart) -> str:
    """What a chart shows in words, for those who do not see it."""
    names = [series.name for series in chart.series]
    of = f" of {', '.join(names)}" if names else ""
    return f"{chart.title}: {chart.y_label} by {chart.x_label}{of}. {chart.caption}".strip()


def _drawable(value: float) -> float:
    return min(max(value, -_LARGEST), _LARGEST)
