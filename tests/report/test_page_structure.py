"""What makes a page readable on a phone, in the dark, in print, by a screen reader. All pages have one stylesheet."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_cases import write_run

from fastkd.report.make import page_of
from fastkd.report.render import to_html
from fastkd.report.runs import read_runs

VOID = {"meta", "br", "img"}


class Elements(HTMLParser):
    """Every element with its attributes and those of the elements around it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str], list[dict[str, str]]]] = []
        self._around: list[dict[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        given = {name: value or "" for name, value in attrs}
        self.found.append((tag, given, list(self._around)))
        if tag not in VOID:
            self._around.append(given)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}, list(self._around)))

    def handle_endtag(self, tag: str) -> None:
        self._around.pop()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("page")
    return to_html(page_of(read_runs([write_run(folder / "a", steps=80), write_run(folder / "b", steps=80)])))


def test_tables_scroll_within_the_page(text: str) -> None:
    tables = [around for tag, _, around in Elements(text).found if tag == "table"]
    assert len(tables) >= 4
    for around in tables:
        assert "table" in around[-1]["class"].split()
    assert ".table{" in text
    assert "overflow-x:auto" in text.partition(".table{")[2].partition("}")[0]


def test_plots_have_words_in_their_place_and_axes_have_units(text: str, tmp_path: Path) -> None:
    plots = [(given, around) for tag, given, around in Elements(text).found if tag == "svg"]
    assert plots
    for given, around in plots:
        if given.get("aria-hidden") == "true":  # the key of a line, beside its name
            continue
        (image,) = [one for one in around if one.get("role") == "img"]
        assert len(image["aria-label"]) > 20
    for chart in page_of(read_runs([write_run(tmp_path / "a", steps=80)])).charts:
        assert chart.x_label
        assert chart.y_label, chart.title
        assert chart.caption


def test_phones_the_dark_and_print(text: str) -> None:
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    for rule in ("@media (prefers-color-scheme:dark)", "@media (max-width:700px)", "@media print"):
        assert rule in text
    assert "color-scheme:light dark" in text
    # colours of plots are those of the page: none is fixed in a drawing
    drawings = text.partition("</style>")[2]
    assert "fill: #" not in drawings
    assert "stroke: #" not in drawings
