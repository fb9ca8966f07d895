"""The parts of a page as plain data: sections of blocks (tables, charts, cards, text). `render.py` makes HTML of them.

All text is plain text. A new kind of block is a class here and a macro of its name in `templates/blocks.html.j2`.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Series:
    """What a line of a chart shows. colour: index into the page's colours; None: grey, for a reference. dashed: for a
    control."""

    name: str
    colour: int | None
    dashed: bool = False


@dataclass(frozen=True)
class Line:
    """Points of a series. band: low and high of each point, where intervals are known."""

    series: Series
    x: Sequence[float]
    y: Sequence[float]
    band: tuple[Sequence[float], Sequence[float]] | None = None
    markers: bool = False


@dataclass(frozen=True)
class Chart:
    """A plot. name: part of its file name. level: a grey horizontal line and its label. diagonal: a grey line where
    both axes are equal. marks: points (x, y) and labels. from_zero: both axes start at 0. log: both are logarithmic."""

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


@dataclass(frozen=True)
class Charts:
    """Charts side by side with one legend."""

    charts: Sequence[Chart]


@dataclass(frozen=True)
class Cell:
    """A table's cell. more: smaller, below (an interval). tone: "good", "bad", "even", "aside" (not measured) or "".
    mark: the tone as a word, so that colour alone says nothing."""

    text: str
    more: str = ""
    tone: str = ""
    mark: str = ""


UNKNOWN = Cell("\u2013", tone="aside")


@dataclass(frozen=True)
class Column:
    """A table's column. note: unit, and which direction is better. text: words, not numbers."""

    name: str
    note: str = ""
    text: bool = False


@dataclass(frozen=True)
class Row:
    """A table's row: its name and a cell per column. series: its line in the charts. marked: highlighted."""

    name: str
    cells: Sequence[Cell]
    note: str = ""
    series: Series | None = None
    marked: bool = False


@dataclass(frozen=True)
class Table:
    """A table. head: heading of the column of row names. folded: if not empty, the table is hidden below this line
    until it is clicked."""

    head: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    caption: str = ""
    folded: str = ""


@dataclass(frozen=True)
class Card:
    """One number in large type."""

    title: str
    figure: str
    more: str
    tone: str = ""


@dataclass(frozen=True)
class Cards:
    """Cards side by side."""

    cards: Sequence[Card]


@dataclass(frozen=True)
class Paragraph:
    """Text. aside: in small type."""

    text: str
    aside: bool = False


@dataclass(frozen=True)
class Notes:
    """Words and their meaning, in small type. folded: as for `Table`."""

    items: Sequence[tuple[str, str]]
    folded: str = ""


@dataclass(frozen=True)
class Code:
    """Text in a fixed-width font, such as a command."""

    text: str
    title: str = ""


@dataclass(frozen=True)
class Share:
    """A bar. share: its length, 0 to 1."""

    name: str
    share: float
    text: str


@dataclass(frozen=True)
class Bars:
    """Bars below each other: parts of a whole."""

    bars: Sequence[Share]
    title: str = ""
    caption: str = ""


@dataclass(frozen=True)
class Answer:
    """A model's most likely next tokens after a prefix, with their probabilities, and its completion."""

    model: str
    tops: Sequence[tuple[str, float]]
    completion: str


@dataclass(frozen=True)
class Example:
    """A prefix and each model's answer."""

    prefix: str
    answers: Sequence[Answer]


@dataclass(frozen=True)
class Examples:
    """Prefixes with answers."""

    examples: Sequence[Example]


Block = Charts | Table | Cards | Paragraph | Notes | Code | Bars | Examples


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
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
