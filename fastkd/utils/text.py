"""The report of `cache.inspect` as text for 80 columns, and helpers for text. Imports nothing heavy.

Text in a cache (fingerprints, notes, names) may be hostile: it is shown without credentials and control characters.
"""

import textwrap
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

from ..cache.credentials import without_credentials
from ..cache.provenance import TEXTS
from .numbers import size_text

Report = dict[str, Any]

__all__ = [
    "TEXTS", "labelled", "printable", "ranges", "report_text", "size_text", "without_credentials"
]  # fmt: skip

_WIDTH = 80
_LABEL = 20  # columns of a line's label
_MOST_LISTED = 8  # ranges, or objects, on one line


def report_text(report: Report) -> str:
    """The report for a person: at most 80 columns, but for names that cannot be broken."""
    lines = [f"fastkd cache  {report['cache']}", *_identity(report), "", *_settings(report["settings"])]
    lines += ["", *_contents(report)]
    if report["arrays"]["shards_read"]:
        lines += ["", *_bytes(report)]
    if report["mass"]["mean"] is not None:
        lines += ["", *_distribution(report)]
    return "\n".join(printable(line) for line in [*lines, "", *_missing(report)])


def printable(text: str) -> str:
    """The text on one line, with unprintable characters escaped: no escape sequence reaches a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def ranges(pairs: Iterable[list[int]]) -> str:
    """[[3, 3], [5, 7]] as "3, 5-7"."""
    shown = [f"{a:,}" if a == b else f"{a:,}-{b:,}" for a, b in pairs]
    more = len(shown) - _MOST_LISTED
    return ", ".join(shown[:_MOST_LISTED]) + (f" and {more:,} more" if more > 0 else "")


def format_table(rows: Sequence[Sequence[str]], *, left: int = 1, gap: int = 2) -> list[str]:
    """Lines of a table, a row each: every column as wide as its widest cell, `gap` spaces apart; the first `left`
    columns are aligned to the left, the others to the right. Rows may be shorter than the widest."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    return [
        (" " * gap).join(f"{cell:{'<' if i < left else '>'}{widths[i]}}" for i, cell in enumerate(row)).rstrip()
        for row in rows
    ]


def labelled(label: str, text: str) -> list[str]:
    """A label and its text, the text wrapped beside it."""
    wrapped = textwrap.wrap(" ".join(text.split()), _WIDTH - _LABEL, break_long_words=False, break_on_hyphens=False)
    return [f"{label if i == 0 else '':<{_LABEL}}{line}" for i, line in enumerate(wrapped or ["-"])]


def _identity(report: Report) -> list[str]:
    state = "sealed" if report["sealed"] else "not sealed"
    lines = labelled("  state", f"{state}, format {report['format']}, spec {report['spec_sha256'][:12]}")
    for name in TEXTS:
        lines += labelled(f"  {name}", report[name])
    return lines


def _settings(settings: Report) -> list[str]:
    codec = settings["codec"]
    topk = f"k = {settings['k']}" if settings["k"] else "none"
    topk += f", cut at {settings['mass']:g} of the mass" if settings["mass"] and settings["k"] else ""
    draws = f"{settings['draws']} at T = {settings['draw_temperature']:g}" if settings["draws"] else "none"
    traits = [f"{codec['compressor']} level {codec['level']}"]
    traits += ["ties sorted"] * codec["sort_ties"] + ["contexts"] * codec["contexts"]
    steps = f"top-k {_step(codec['step'])}"
    steps += f" growing as e^({codec['growth']:g} x) to {_step(codec['cap'])}" if codec["growth"] else ""
    steps += f", tail {_step(codec['tail_step'])}"
    steps += f", draws {_step(codec['draw_step'])}" if settings["draws"] else ""
    return [
        "Settings",
        *labelled("  vocabulary", f"{settings['vocab_size']:,}"),
        *labelled("  top-k entries", topk),
        *labelled("  draws", draws),
        *labelled("  tails at T =", ", ".join(f"{t:g}" for t in settings["temperatures"])),
        *labelled("  inputs", ", ".join(settings["inputs"]) or "none"),
        *labelled("  codec", f"{codec['name']} ({', '.join(traits)})"),
        *labelled("  steps in nats", steps),
        *labelled("  shard", f"up to {settings['shard_positions']:,} positions"),
    ]


def _step(step: float) -> str:
    fraction = Fraction(step).limit_denominator(10_000)
    return f"1/{fraction.denominator}" if fraction.numerator == 1 and float(fraction) == step else f"{step:g}"


def _contents(report: Report) -> list[str]:
    rows = [(name, report[name], "") for name in ("shards", "sequences", "positions")]
    positions, counted = report["positions"], report["counted"]
    rows.append(("counted", counted, f"  {counted / positions:.1%} of the positions" if positions else ""))
    for label, name, use in (("top-k", "head_entries", "k"), ("drawn", "draw_entries", "draws")):
        if report["settings"][use]:
            each = f"  {report[name] / counted:.2f} per counted position" if counted else ""
            rows.append((f"{label} entries", report[name], each))
    each = f"  {size_text(report['bytes'])}, {report['bytes_per_position']:.1f} per position" if positions else ""
    rows.append(("bytes", report["bytes"], each))
    width = max(len(f"{number:,}") for _, number, _ in rows)
    return ["Contents", *(f"{f'  {label}':<{_LABEL}}{number:>{width},}{more}" for label, number, more in rows)]


def _bytes(report: Report) -> list[str]:
    read, each = report["arrays"]["shards_read"], report["arrays"]["bytes_per_position"]
    whole = "all shards" if read == report["shards"] else f"{read} of {report['shards']:,} shards, evenly chosen"
    total = sum(each.values()) or 1
    width = max(_LABEL, *(len(name) for name in each)) + 4
    lines = [f"{f'  {name}':<{width}}{size:>10.3f}{size / total:>8.1%}" for name, size in each.items()]
    lines += [f"{'  total':<{width}}{total:>10.3f}", "  other: the arrays' names, shapes and codecs; headers"]
    return [f"Bytes per position, by array (from {whole})", *lines]


def _distribution(report: Report) -> list[str]:
    lines = [f"{'Counted positions':<{_LABEL + 4}}" + "".join(f"{which:>9}" for which in report["mass"])]
    for what, label in (("mass", "mass of the top-k"), ("entropy", "entropy in nats")):
        values = ("-" if value is None else f"{value:.4f}" for value in report[what].values())
        lines.append(f"{f'  {label}':<{_LABEL + 4}}" + "".join(f"{value:>9}" for value in values))
    lines.append("  entropy: with everything outside the top-k entries as one outcome")
    return lines + (["  p05, p50, p95: means of the quantiles of each shard"] if report["shards"] > 1 else [])


def _missing(report: Report) -> list[str]:
    missing, lines = report["missing"], ["Missing"]
    for label, pairs in (("shards", missing["shards"]), ("sequences", missing["sequences"])):
        if pairs:
            lines += labelled(f"  {label}", f"{ranges(pairs)} ({sum(b - a + 1 for a, b in pairs):,} in all)")
    if gone := missing["objects"]:
        lines += labelled("  objects", f"of shards {ranges(gone)}: in the manifest, but missing in the store")
    if not report["shards"]:
        lines.append("  everything: there are no shards yet")
    if len(lines) == 1:
        lines.append("  nothing up to the last shard")
    if not missing["listed"]:
        lines.append("  The store cannot be listed: this is from the manifest.")
    for one, other in report["overlaps"][:_MOST_LISTED]:
        lines += labelled("Overlap", f"shards {one:,} and {other:,} hold some of the same sequences")
    if (more := len(report["overlaps"]) - _MOST_LISTED) > 0:
        lines += labelled("", f"and {more:,} more pairs")
    if late := report["not_in_manifest"]:
        lines += labelled("Not sealed in", f"shards {ranges(late)}: written after the cache was sealed")
    for key in report["foreign"][:_MOST_LISTED]:
        lines += labelled("Foreign", f"{key} is no shard's name")
    if (more := len(report["foreign"]) - _MOST_LISTED) > 0:
        lines += labelled("", f"and {more:,} more names")
    return lines
