"""Sections of data that a run's folder does not have: completions, what students cost, and the cache they came from."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..utils.numbers import (
    DASH,
    THIN,
    decimals,
    figures,
    percent,
    prefixed,
    seconds,
)
from ..utils.text import TEXTS, without_credentials
from .page import (
    Bars,
    Block,
    Card,
    Cards,
    Cell,
    Chart,
    Charts,
    Column,
    Example,
    Examples,
    Line,
    Paragraph,
    Row,
    Section,
    Series,
    Share,
    Table,
)


def completions(examples: Sequence[Example], note: str = "") -> Section:
    """Held-out prefixes: what teacher, student and control expect next, and what each makes of it."""
    says = note or (
        "Prefixes from held-out text. Bars: the five most likely next tokens of each model and their probabilities; "
        "under them what it writes when it always takes the most likely one."
    )
    return Section("What they say", [Paragraph(says), Examples(examples)])


def cost(*, capture: float, cached: float, live: float, students: int = 10, note: str = "") -> Section:
    """Cumulative seconds against the number of students: the teacher run live for each, or once into a cache.

    capture: seconds that the cache took, once. cached: seconds to train a student from it. live: seconds to train one
    with the teacher beside it. students: how far the chart goes, at least. note: how these were come by. ValueError
    where one of them is no positive number.
    """
    if not all(math.isfinite(x) and x > 0 for x in (capture, cached, live)):
        raise ValueError(f"capture, cached, live: got {capture}, {cached} and {live}; expected positive seconds.")
    even = break_even(capture=capture, cached=cached, live=live)
    last = max(2, students, 0 if even is None else math.ceil(1.3 * even))
    x = list(range(last + 1))
    unit, name = (60.0, "minutes") if max(capture + cached * last, live * last) > 300 else (1.0, "seconds")
    lines = [
        Line(Series("teacher live for each student", 1), x, [live * n / unit for n in x], markers=last <= 20),
        # the cache is there before the first student is
        Line(Series("one cache", 0), x, [(capture + cached * n) / unit for n in x], markers=last <= 20),
    ]
    verdict, marks = "never", []
    if even is not None:
        verdict = f"{even} student{'s' * (even > 1)}"
        marks = [(float(even), (capture + cached * even) / unit, f"break-even: {verdict}")]
    caption = "Where the lines have crossed the cache has paid for itself; lower is better."
    chart = Chart("cost", "Time, in all", caption, "students", name, lines, marks=marks, from_zero=True)
    cards = Cards(
        [
            Card("the cache has paid for itself after", verdict, "of the same size and number of steps"),
            Card("once", seconds(capture), "to capture the cache"),
            Card("each student from the cache", seconds(cached), "to train"),
            Card("each with a live teacher", seconds(live), f"{figures(live / cached, 2)} times as long"),
        ]
    )
    blocks: list[Block] = [cards, Charts([chart])]
    if note:
        blocks.append(Paragraph(note, aside=True))
    return Section("Cost against the number of students", blocks)


def break_even(*, capture: float, cached: float, live: float) -> int | None:
    """The number of students from which on the cache is no dearer; None where it always is."""
    if live <= cached:
        return None
    return max(1, math.ceil(capture / (live - cached) - 1e-9))


def cache_section(reports: Sequence[Mapping[str, Any]], notes: Sequence[str] = ()) -> Section | None:
    """What `inspect_cache` says of the runs' caches. notes: of those that are not to be had."""
    if not reports and not notes:
        return None
    blocks: list[Block] = []
    for report in reports:
        blocks += _cache(report, several=len(reports) > 1)
    blocks += [Paragraph(note, aside=True) for note in notes]
    return Section("The cache" if len(reports) < 2 else "The caches", blocks)


def _cache(report: Mapping[str, Any], several: bool) -> list[Block]:
    settings, counted = report["settings"], report["counted"]
    positions = report["positions"]
    each = report["bytes_per_position"]
    head = f"{settings['k']} exact entries" if settings["k"] else "no head"
    if settings["k"] and settings["mass"]:
        head += f", cut at {percent(settings['mass'])} of the mass"
    draws = f"{settings['draws']} drawn at T = {settings['draw_temperature']:g}" if settings["draws"] else "no draws"
    rows = [
        ("positions", f"{decimals(positions)}, of which {decimals(counted)} count"),
        ("size", f"{prefixed(report['bytes'], 'B')} in {decimals(report['shards'])} shards"),
        ("a position", f"{figures(each)}{THIN}bytes" if each is not None else DASH),
        ("a target", f"{head}, {draws}"),
        ("tails at T =", ", ".join(f"{t:g}" for t in settings["temperatures"])),
        ("vocabulary", decimals(settings["vocab_size"])),
        ("codec", str(settings["codec"]["name"])),
        ("state", "sealed" if report["sealed"] else "not sealed"),
        ("spec", report["spec_sha256"][:12]),
        *((name, without_credentials(str(report[name]))) for name in TEXTS if report[name]),
    ]
    title = str(report["cache"]) if several else ""
    blocks: list[Block] = [
        Table(title or "what", [Column("of the cache", text=True)], [Row(n, [Cell(text)]) for n, text in rows])
    ]
    if report["mass"]["mean"] is not None:
        columns = [Column(which) for which in report["mass"]]
        shown = [
            Row("mass in the head", [Cell(figures(v)) for v in report["mass"].values()]),
            Row("entropy, nats", [Cell(figures(v)) for v in report["entropy"].values()]),
        ]
        says = (
            "Over the positions that count. Entropy: of the head, and all the rest as one outcome. Quantiles: means of "
            "each shard's own."
        )
        blocks.append(Table("a position", columns, shown, says))
    if bars := _sizes(report["arrays"]["bytes_per_position"]):
        caption = "other: the arrays' names, shapes and codecs; headers."
        blocks.append(Bars(bars, "Bytes a position, by array", caption))
    return blocks


def _sizes(sizes: Mapping[str, float]) -> list[Share]:
    """A bar an array; those of less than a hundredth of all have one together."""
    total = sum(sizes.values())
    small = {name for name, size in sizes.items() if name != "other" and size < total / 100}
    shown = {name: size for name, size in sizes.items() if name not in small}
    if small:
        rest = sum(sizes[name] for name in small)
        shown = (
            {n: s for n, s in shown.items() if n != "other"}
            | {f"{len(small)} small ones": rest}
            | {n: s for n, s in shown.items() if n == "other"}
        )
    return [Share(name, size / total, f"{figures(size)}{THIN}B") for name, size in shown.items()]
