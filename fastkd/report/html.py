"""A page as HTML: the one place where text becomes markup, and all of it is escaped here.

Nothing is asked of any server, and the page says so to the browser too (Content-Security-Policy).
"""

import unicodedata
from collections.abc import Sequence
from html import escape

from ..utils.numbers import percent
from .page import (
    Bars,
    Block,
    Cards,
    Cell,
    Chart,
    Charts,
    Code,
    Column,
    Examples,
    Notes,
    Page,
    Paragraph,
    Row,
    Section,
    Series,
    Share,
    Table,
)
from .plots import COLOURS, legend, svg
from .style import sheet

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_UNSEEN = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")  # Unicode's categories of control characters and the like
_WIDE = 3  # columns: a table that has more becomes a list on a phone


def to_html(page: Page) -> str:
    """The whole document."""
    sections = "\n".join(_section(section) for section in page.sections)
    foot = f"<footer>{_text(page.foot)}</footer>" if page.foot else ""
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(page.title)}</title><style>{sheet()}</style></head>\n"
        f'<body><header><h1>{_text(page.title)}</h1><p class="lead">{_text(page.lead)}</p></header>\n'
        f"<main>\n{sections}\n</main>{foot}</body></html>\n"
    )


def _text(text: str) -> str:
    """Escaped; what a browser would not show, or would let change the direction of what follows, is spelt out."""
    shown = "".join(c if unicodedata.category(c) not in _UNSEEN or c in "\n\t" else f"\\u{ord(c):04x}" for c in text)
    return escape(shown, quote=True)


def _section(section: Section) -> str:
    title = f"<h2>{_text(section.title)}</h2>" if section.title else ""
    return f"<section>{title}{''.join(_block(block) for block in section.blocks)}</section>"


def _block(block: Block) -> str:
    match block:
        case Cards():
            return _cards(block)
        case Charts():
            return _charts(block.charts)
        case Table():
            return _table(block)
        case Paragraph():
            return f"<p{' class=aside' if block.aside else ''}>{_text(block.text)}</p>"
        case Notes():
            items = "".join(f"<dt>{_text(word)}</dt><dd>{_text(says)}</dd>" for word, says in block.items)
            return _folded(f"<dl>{items}</dl>", block.folded)
        case Code():
            title = f"<h3>{_text(block.title)}</h3>" if block.title else ""
            return f"<div>{title}<pre>{_text(block.text)}</pre></div>"
        case Bars():
            title = f"<h3>{_text(block.title)}</h3>" if block.title else ""
            caption = f'<p class="caption">{_text(block.caption)}</p>' if block.caption else ""
            return f'<div class="panel">{title}{_bars(block.bars)}{caption}</div>'
        case Examples():
            return _examples(block)


def _cards(block: Cards) -> str:
    cards = "".join(
        f'<div class="card"><span class="what">{_text(card.title)}</span>'
        f'<span class="figure">{_text(card.figure)}</span>'
        f'<span class="more {_tone(card.tone)}">{_text(card.more)}</span></div>'
        for card in block.cards
    )
    return f'<div class="cards">{cards}</div>'


def _charts(charts: Sequence[Chart]) -> str:
    keys = "".join(f"<li>{_key(series)}{_text(series.name)}</li>" for series in legend(charts))
    panels = "".join(
        f'<figure class="panel"><h3>{_text(chart.title)}</h3>{svg(chart)}'
        f"<figcaption>{_text(chart.caption)}</figcaption></figure>"
        for chart in charts
    )
    return f'<ul class="legend">{keys}</ul><div class="charts{" one" * (len(charts) == 1)}">{panels}</div>'


def _key(series: Series) -> str:
    """A bit of the line as it is drawn."""
    colour = "var(--grey)" if series.colour is None else f"var(--s{series.colour % len(COLOURS)})"
    dashes = ' stroke-dasharray="7 3"' if series.dashed else ' stroke-dasharray="2 3"' if series.colour is None else ""
    line = f'<line x1="0" y1="5" x2="26" y2="5" style="stroke:{colour};stroke-width:3"{dashes}/>'
    return f'<svg class="key" viewBox="0 0 26 10" aria-hidden="true">{line}</svg>'


def _table(table: Table) -> str:
    wide = len(table.columns) > _WIDE
    head = "".join(f"<th scope=col{_words(c)}>{_text(c.name)}{_small(c.note)}</th>" for c in table.columns)
    body = "".join(_row(row, table.columns) for row in table.rows)
    rows = f"<thead><tr><th scope=col>{_text(table.head)}</th>{head}</tr></thead><tbody>{body}</tbody>"
    found = f'<div class="table{" wide" * wide}"><table>{rows}</table></div>'
    caption = f'<p class="caption">{_text(table.caption)}</p>' if table.caption else ""
    return _folded(found, table.folded) if table.folded else f"<div>{found}{caption}</div>"


def _row(row: Row, columns: Sequence[Column]) -> str:
    key = f"{_key(row.series)} " if row.series is not None else ""
    cells = "".join(_cell(cell, column) for cell, column in zip(row.cells, columns, strict=True))
    mark = ' class="mark"' if row.marked else ""
    return f"<tr{mark}><th scope=row>{key}{_text(row.name)}{_small(row.note)}</th>{cells}</tr>"


def _cell(cell: Cell, column: Column) -> str:
    name = f"{column.name}, {column.note}" if column.note else column.name
    classes = " ".join(filter(None, ["words" if column.text else "", _tone(cell.tone), "off" * (cell.tone == "aside")]))
    more = f"<small>{_text(cell.more)}</small>" if cell.more else ""
    word = f'<small class="word">{_text(cell.mark)}</small>' if cell.mark else ""
    inner = f'<span class="value">{_text(cell.text)}</span>{more}{word}'
    return f'<td class="{classes}" data-name="{_text(name)}">{inner}</td>'


def _bars(bars: Sequence[Share]) -> str:
    return '<div class="bars">' + "".join(
        f'<span class="name">{_text(bar.name)}</span>'
        f'<span class="bar"><i style="width:{_width(bar.share)}%"></i></span>'
        f'<span class="text">{_text(bar.text)}</span>'
        for bar in bars
    ) + "</div>"  # fmt: skip


def _examples(block: Examples) -> str:
    found = []
    for example in block.examples:
        answers = "".join(
            f"<div><h3>{_text(answer.model)}</h3>"
            + _bars([Share(_visible(token), p, percent(p, 2)) for token, p in answer.tops])
            + f'<p class="completion">{_text(answer.completion)}</p></div>'
            for answer in example.answers
        )
        prefix = f'<p class="prefix">{_text(example.prefix)}</p>'
        found.append(f'<div class="example">{prefix}<div class="answers">{answers}</div></div>')
    return f"<div>{''.join(found)}</div>"


def _visible(token: str) -> str:
    """A token whose spaces and ends of lines can be seen."""
    return token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


def _folded(inner: str, title: str) -> str:
    if not title:
        return inner
    return f'<details class="fold"><summary>{_text(title)}</summary>{inner}</details>'


def _small(text: str) -> str:
    return f"<small>{_text(text)}</small>" if text else ""


def _words(column: Column) -> str:
    return " class=words" if column.text else ""


def _tone(tone: str) -> str:
    return tone if tone in ("good", "bad") else ""


def _width(share: float) -> str:
    """Of a bar, in per cent, within 0 and 100 whatever is given."""
    return f"{100 * min(max(share, 0.0), 1.0):.2f}" if share == share else "0"
