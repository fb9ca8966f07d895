"""Pages as HTML, by Jinja2 from `templates/`. Autoescape is on: text never becomes markup. Credentials are masked.

The page is one file that loads nothing, and its Content-Security-Policy says so to the browser.
"""

import unicodedata
from functools import cache, partial
from pathlib import Path
from typing import Any

from ..errors import ReportError
from ..utils.numbers import percent
from ..utils.secrets import masked
from .page import Page
from .plots import COLOURS, GREY, GRID, INK, alternative, style_of, svg

_OUTLINES = {  # markers of matplotlib as paths around (13, 5)
    "o": "M9.6 5a3.4 3.4 0 1 0 6.8 0a3.4 3.4 0 1 0 -6.8 0z",
    "s": "M10 2h6v6h-6z",
    "D": "M13 .8l4.2 4.2l-4.2 4.2l-4.2 -4.2z",
    "^": "M13 1l4 7h-8z",
    "v": "M13 9l4 -7h-8z",
    "P": "M11.7 1.2h2.6v2.5h2.5v2.6h-2.5v2.5h-2.6v-2.5h-2.5v-2.6h2.5z",
    "x": "M10.5 2.5l5 5m-5 0l5 -5",
}
_UNSEEN = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")  # Unicode categories of control characters and the like


def to_html(page: Page) -> str:
    """The whole document. Raises ReportError if Jinja2 is not installed, or matplotlib for a page with charts."""
    text: str = _environment().get_template("page.html.j2").render(page=page)
    return text


@cache
def _environment() -> Any:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise ReportError(
            "jinja2 is not installed; pages are made with it. Use pip install 'fastkd[report]'."
        ) from error
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=lambda value: _spelled_out(masked(value)) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        svg=lambda chart: Markup(svg(chart)),
        legend=lambda charts: dict.fromkeys(line.series for chart in charts for line in chart.lines),
        style=style_of,
        alternative=alternative,
        outline=lambda series: _OUTLINES[style_of(series).marker],
        percent=percent,
        bar_width=lambda share: f"{100 * min(max(share, 0.0), 1.0):.2f}" if share == share else "0",  # NaN: 0
        visible_token=lambda token: token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥"),
    )
    environment.globals.update(zip=partial(zip, strict=True), colours=COLOURS, ink=INK, grid=GRID, grey=GREY)
    return environment


def _spelled_out(text: str) -> str:
    """Characters that a browser would not show, or that would change the direction of the text, as their codes."""
    return "".join(c if unicodedata.category(c) not in _UNSEEN or c in "\n\t" else f"\\u{ord(c):04x}" for c in text)
