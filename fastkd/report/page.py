"""The parts of a page as plain data: sections of blocks (tables, charts, cards, text). `render.py` makes HTML of them.

All text is plain text. A new kind of block is a class here and a macro of its name in `templates/blocks.html.j2`.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Series(NamedTuple):
    """What a line of a chart shows. colour: its number, by which it has a colour, a marker and a kind of line (see
    `plots.style_of`); None: grey, for a reference. dashed: for a control."""

    name: str
    colour: int | None
    dashed: bool = False


class Line(NamedTuple):
    """Points of a series. band: low and high of each point, where intervals are known."""

    series: Series
    x: Sequence[float]
    y: Sequence[float]
    band: tuple[Sequence[float], Sequence[float]] | None = None
    markers: bool = False


class Spread(NamedTuple):
    """A row of a chart: values, their mean, and half the interval around it; None: it is not known."""

    series: Series
    values: Sequence[float]
    mean: float
    half: float | None = None


class Chart(NamedTuple):
    """A plot. name: part of its file name. level: a grey horizontal line and its label. diagonal: a grey line where
    both axes are equal. marks: points (x, y) and labels. from_zero: both axes start at 0. log: both are logarithmic.
    spreads: rows from the top down, in place of lines."""

    name: str
    title: str
    caption: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    level: tuple[float, str] | None = None
    diagonal: bool = False
    marks: Sequence[tuple[float, float, str]] = ()
    from_zero: bool = False
    log: bool = False
    spreads: Sequence[Spread] = ()

    @property
    def series(self) -> list[Series]:
        """What it shows, each once, in order."""
        each = [line.series for line in self.lines] + [spread.series for spread in self.spreads]
        return list(dict.fromkeys(each))


class Charts(NamedTuple):
    """Charts side by side with one legend."""

    charts: Sequence[Chart]


class Cell(NamedTuple):
    """A table's cell. more: smaller, below (an interval). tone: "good", "bad", "even", "aside" (not measured; so is a
    lone dash) or "". mark: the tone as a word, so that colour alone says nothing. shade: strength of a background in
    the tone's colour, from 0 (none) to 1."""

    text: str
    more: str = ""
    tone: str = ""
    mark: str = ""
    shade: float = 0.0


UNKNOWN = Cell("\u2013")


class Column(NamedTuple):
    """A table's column. note: unit, and which direction is better. text: words, not numbers."""

    name: str
    note: str = ""
    text: bool = False


class Row(NamedTuple):
    """A table's row: its name and a cell per column. series: its line in the charts. marked: highlighted."""

    name: str
    cells: Sequence[Cell]
    note: str = ""
    series: Series | None = None
    marked: bool = False


class Table(NamedTuple):
    """A table. head: heading of the column of row names. folded: if not empty, the table is hidden below this line
    until it is clicked."""

    head: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    caption: str = ""
    folded: str = ""


class Card(NamedTuple):
    """One number in large type."""

    title: str
    figure: str
    more: str
    tone: str = ""


class Cards(NamedTuple):
    """Cards side by side."""

    cards: Sequence[Card]


class Paragraph(NamedTuple):
    """Text. aside: in small type."""

    text: str
    aside: bool = False


class Notes(NamedTuple):
    """Words and their meaning, in small type. folded: as for `Table`."""

    items: Sequence[tuple[str, str]]
    folded: str = ""


class Code(NamedTuple):
    """Text in a fixed-width font, such as a command."""

    text: str
    title: str = ""


class Answer(NamedTuple):
    """A model's most likely next tokens after a prefix, with their probabilities, and its completion."""

    model: str
    tops: Sequence[tuple[str, float]]
    completion: str


class Example(NamedTuple):
    """A prefix and each model's answer."""

    prefix: str
    answers: Sequence[Answer]


Block = Charts | Table | Cards | Paragraph | Notes | Code | Example


class Section(NamedTuple):
    """A part of the page with a heading."""

    title: str
    blocks: Sequence[Block]


class Page(NamedTuple):
    """A whole page. lead: below the title. foot: at the end."""

    title: str
    lead: str
    sections: Sequence[Section]
    foot: str = ""

    @property
    def charts(self) -> list[Chart]:
        """All charts."""
        blocks = [block for section in self.sections for block in section.blocks]
        return [chart for block in blocks if isinstance(block, Charts) for chart in block.charts]
