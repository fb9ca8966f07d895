"""Time against the number of students: a live teacher for each, or one cache for all. Used by the demo."""

import math

from ...utils.numbers import figures, seconds
from ..page import Block, Card, Cards, Chart, Charts, Line, Paragraph, Section, Series


def cost_section(*, capture: float, cached: float, live: float, students: int = 10, note: str = "") -> Section:
    """Cumulative seconds by number of students.

    capture: seconds for the capture, once. cached: seconds to train a student from the cache. live: seconds to train
    one with a live teacher. students: the chart goes at least this far. note: how the three were measured. Raises
    ValueError if one of them is not a positive number.
    """
    if not all(math.isfinite(x) and x > 0 for x in (capture, cached, live)):
        raise ValueError(f"capture, cached, live: got {capture}, {cached} and {live}; expected positive seconds.")
    even = break_even(capture=capture, cached=cached, live=live)
    last = max(2, students, 0 if even is None else math.ceil(1.3 * even))
    x = list(range(last + 1))
    unit, name = (60.0, "minutes") if max(capture + cached * last, live * last) > 300 else (1.0, "seconds")
    lines = [
        Line(Series("live teacher for each student", 1), x, [live * n / unit for n in x], markers=last <= 20),
        # the cache is captured before the first student
        Line(Series("one cache", 0), x, [(capture + cached * n) / unit for n in x], markers=last <= 20),
    ]
    verdict, marks = "never", []
    if even is not None:
        verdict = f"{even} student{'s' * (even > 1)}"
        marks = [(float(even), (capture + cached * even) / unit, f"break-even: {verdict}")]
    caption = "The cache is cheaper to the right of the crossing; lower is better."
    chart = Chart("cost", "Total time", caption, "students", name, lines, marks=marks, from_zero=True)
    cards = Cards(
        [
            Card("the cache pays off after", verdict, "of the same size and number of steps"),
            Card("capture", seconds(capture), "once"),
            Card("a student from the cache", seconds(cached), "to train"),
            Card("a student with a live teacher", seconds(live), f"{figures(live / cached, 2)} times as long"),
        ]
    )
    blocks: list[Block] = [cards, Charts([chart])]
    return Section("Cost by number of students", blocks + ([Paragraph(note, aside=True)] if note else []))


def break_even(*, capture: float, cached: float, live: float) -> int | None:
    """The number of students from which the cache takes no more time; None if it always takes more."""
    return max(1, math.ceil(capture / (live - cached) - 1e-9)) if live > cached else None
