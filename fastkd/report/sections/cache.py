"""The caches that the runs were trained from."""

from collections.abc import Mapping
from typing import Any

from ...cache import CacheError, open_cache
from ...cache.inspect import inspect_cache
from ...utils.numbers import DASH, THIN, decimals, figures, percent, prefixed
from ...utils.text import TEXTS, without_credentials
from ..comparison import Comparison
from ..page import Bars, Block, Cell, Column, Paragraph, Row, Section, Share, Table
from ..runs import Run

POSITION = 50
_SMALL = 1 / 100  # arrays that take a smaller share of the bytes are shown as one bar


def build(comparison: Comparison) -> Section | None:
    """What `fastkd inspect` says of each cache, once."""
    reports, notes = _inspected(comparison)
    blocks = [block for report in reports for block in _cache(report, titled=len(reports) > 1)]
    blocks += [Paragraph(note, aside=True) for note in notes]
    return Section("Cache" if len(reports) < 2 else "Caches", blocks) if blocks else None


def _inspected(comparison: Comparison) -> tuple[list[dict[str, Any]], list[str]]:
    """The reports of `inspect_cache`; and notes on the caches that cannot be opened, or have been replaced."""
    reports: list[dict[str, Any]] = []
    notes: list[str] = []
    caches: dict[str, tuple[Run, str, str]] = {}
    for run, _ in comparison.students:
        for place, spec in run.caches:
            caches.setdefault(spec or place, (run, place, spec))
    for run, place, spec in caches.values():
        shown = without_credentials(place)
        try:
            report = inspect_cache(open_cache(place))
        except (CacheError, OSError) as error:
            notes.append(f"The cache of {run.name}, {shown}, cannot be read: {without_credentials(str(error))}")
            continue
        if spec and report["spec_sha256"] != spec:
            notes.append(f"{shown} now holds another cache than the one that {run.name} was trained from.")
            continue
        reports.append(report)
    return reports, notes


def _cache(report: Mapping[str, Any], titled: bool) -> list[Block]:
    settings, each = report["settings"], report["bytes_per_position"]
    entries = f"{settings['k']} top-k entries" if settings["k"] else "no top-k entries"
    if settings["k"] and settings["mass"]:
        entries += f", cut at {percent(settings['mass'])} of the mass"
    draws = f"{settings['draws']} draws at T = {settings['draw_temperature']:g}" if settings["draws"] else "no draws"
    rows = {
        "positions": f"{decimals(report['positions'])}, {decimals(report['counted'])} of them counted",
        "size": f"{prefixed(report['bytes'], 'B')} in {decimals(report['shards'])} shards",
        "per position": f"{figures(each)}{THIN}bytes" if each is not None else DASH,
        "soft target": f"{entries}, {draws}",
        "tails at T =": ", ".join(f"{t:g}" for t in settings["temperatures"]),
        "vocabulary": decimals(settings["vocab_size"]),
        "codec": str(settings["codec"]["name"]),
        "state": "sealed" if report["sealed"] else "not sealed",
        "spec": report["spec_sha256"][:12],
    } | {name: without_credentials(str(report[name])) for name in TEXTS if report[name]}
    head = str(report["cache"]) if titled else "cache"
    blocks: list[Block] = [
        Table(head, [Column("value", text=True)], [Row(name, [Cell(text)]) for name, text in rows.items()])
    ]
    if report["mass"]["mean"] is not None:
        names = {"mass": "mass of the top-k entries", "entropy": "entropy, nats"}
        shown = [Row(text, [Cell(figures(v)) for v in report[name].values()]) for name, text in names.items()]
        caption = (
            "Over counted positions. Entropy: with everything outside the top-k entries as one outcome. Quantiles: "
            "means of the quantiles of each shard."
        )
        blocks.append(Table("per position", [Column(which) for which in report["mass"]], shown, caption))
    if bars := _sizes(report["arrays"]["bytes_per_position"]):
        caption = "other: names, shapes and codecs of the arrays; headers."
        blocks.append(Bars(bars, "Bytes per position, by array", caption))
    return blocks


def _sizes(sizes: Mapping[str, float]) -> list[Share]:
    """A bar per array, one for all small arrays together, and "other" last."""
    total = sum(sizes.values())
    small = {name: size for name, size in sizes.items() if name != "other" and size < _SMALL * total}
    shown = {name: size for name, size in sizes.items() if name not in small and name != "other"}
    shown |= {f"{len(small)} small arrays": sum(small.values())} if small else {}
    shown |= {name: sizes[name] for name in ("other",) if name in sizes}
    return [Share(name, size / total, f"{figures(size)}{THIN}B") for name, size in shown.items()]
