"""What a page is made of: plain data, in the words of a report, not of HTML. All text is text."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Series:
    """Who a line belongs to. colour: which of the page's colours, from 0 on; None for a reference, in grey.
    dashed: for a control."""

    name: str
    colour: int | None
    dashed: bool = False


@dataclass(frozen=True)
class Line:
    """Points of one series; band: low and high of each point, where there are intervals."""

    series: Series
    x: Sequence[float]
    y: Sequence[float]
    band: tuple[Sequence[float], Sequence[float]] | None = None
    markers: bool = False


@dataclass(frozen=True)
class Chart:
    """A plot. name: of its file. caption: which way is better, and what else must be known. level: a grey line across,
    and what it is. diagonal: a grey line where both axes are equal. marks: words at points. log: both axes."""

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
    """Charts side by side, with one legend."""

    charts: Sequence[Chart]


@dataclass(frozen=True)
class Cell:
    """A figure in a table. more: what stands smaller beside it (its interval). tone: "good", "bad", "even", "aside" for
    what is not measured, or "". mark: a word for it, so that nothing is said by colour alone."""

    text: str
    more: str = ""
    tone: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Column:
    """A table's column. note: unit, and which way is better. text: words, not figures."""

    name: str
    note: str = ""
    text: bool = False


@dataclass(frozen=True)
class Row:
    """A row: what it is of, and a cell a column. series: its line in the charts. marked: it is pointed out."""

    name: str
    cells: Sequence[Cell]
    note: str = ""
    series: Series | None = None
    marked: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of figures. head: over the column of names. folded: the words to click on, where it is shown on demand."""

    head: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    caption: str = ""
    folded: str = ""


@dataclass(frozen=True)
class Card:
    """One figure to be seen first."""

    title: str
    figure: str
    more: str
    tone: str = ""


@dataclass(frozen=True)
class Cards:
    """Some figures side by side."""

    cards: Sequence[Card]


@dataclass(frozen=True)
class Paragraph:
    """Text. aside: smaller."""

    text: str
    aside: bool = False


@dataclass(frozen=True)
class Notes:
    """Words and what they mean, small. folded: the words to click on, where they are shown on demand."""

    items: Sequence[tuple[str, str]]
    folded: str = ""


@dataclass(frozen=True)
class Code:
    """Text to be typed. title: over it."""

    text: str
    title: str = ""


@dataclass(frozen=True)
class Share:
    """A part of a whole, shown as a bar. share: 0 to 1."""

    name: str
    share: float
    text: str


@dataclass(frozen=True)
class Bars:
    """Parts of a whole, or probabilities, one under another."""

    bars: Sequence[Share]
    title: str = ""
    caption: str = ""


@dataclass(frozen=True)
class Answer:
    """What a model makes of a prefix: the most likely next tokens with their probabilities, and a completion."""

    model: str
    tops: Sequence[tuple[str, float]]
    completion: str


@dataclass(frozen=True)
class Example:
    """A prefix, and each model's answer."""

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
    """All of it. lead: under the title. foot: at the end."""

    title: str
    lead: str
    sections: Sequence[Section]
    foot: str = ""

    @property
    def charts(self) -> list[Chart]:
        """All its charts."""
        blocks = [block for section in self.sections for block in section.blocks]
        return [chart for block in blocks if isinstance(block, Charts) for chart in block.charts]
