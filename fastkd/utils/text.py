"""The report of `cache.inspect` as text for 80 columns, and helpers for text. Imports nothing heavy.

Text in a cache (fingerprints, notes, names) may be hostile: it is shown without credentials and control characters.
"""

import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from ..cache.credentials import without_credentials
from ..cache.provenance import TEXTS
from .numbers import size_text
from .words import TEXT, Words, words_of

__all__ = [
    "HASH",
    "TEXTS",
    "features_lines",
    "labelled",
    "printable",
    "ranges",
    "report_text",
    "shortened",
    "size_text",
    "without_credentials",
]

_WIDTH = 80
_LABEL = 20  # columns of a line's label
HASH = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")
"""A sha256 in hexadecimal; its first group is shown."""
_LONG_WORD = re.compile(r"\S{501,}")
_MOST_LISTED = 8  # ranges, or objects, on one line


def printable(text: str, *, keep: str = "") -> str:
    """The text on one line, with unprintable characters escaped: no escape sequence reaches a terminal. keep: these are
    not escaped."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, most: int = 4000) -> str:
    """A message without the middle of values that nobody reads: of each word of more than 500 characters, and of a text
    of more than `most`. The end stays, which says what to do. Mask it first: credentials are known whole."""
    text = _LONG_WORD.sub(lambda found: _without_middle(found[0], 200, 60), text)
    return _without_middle(text, most * 3 // 4, most // 5) if len(text) > most else text


def _without_middle(text: str, begin: int, end: int) -> str:
    return f"{text[:begin]}… ({len(text) - begin - end:,} characters) …{text[-end:]}"


def ranges(pairs: Iterable[list[int]]) -> str:
    """[[3, 3], [5, 7]] as "3, 5-7"."""
    shown = [f"{a:,}" if a == b else f"{a:,}-{b:,}" for a, b in pairs]
    more = len(shown) - _MOST_LISTED
    return ", ".join(shown[:_MOST_LISTED]) + (f" and {more:,} more" if more > 0 else "")


def numbered(word: str, pairs: Iterable[list[int]]) -> str:
    """Shard 3, or shards 3 and 5 to 7: "shard 3", "shards 3, 5-7"."""
    pairs = list(pairs)
    return f"{word}{'' if _single(pairs) else 's'} {ranges(pairs)}"


def are_missing(pairs: Iterable[list[int]]) -> str:
    """That shards are missing: "shard 3 is missing", "shards 3, 5-7 are missing"."""
    pairs = list(pairs)
    return f"{numbered('shard', pairs)} {'is' if _single(pairs) else 'are'} missing"


def them(pairs: Iterable[list[int]]) -> str:
    """The pronoun for shards: "it" or "them"."""
    return "it" if _single(list(pairs)) else "them"


def _single(pairs: list[list[int]]) -> bool:
    return sum(b - a + 1 for a, b in pairs) == 1


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


def report_text(report: dict[str, Any]) -> str:
    """The report for a person: at most 80 columns, but for names that cannot be broken."""
    words = words_of(report["settings"]["inputs"])
    facts = {
        "state": f"{'sealed' if report['sealed'] else 'not sealed'}, format {report['format']}",
        **{name: text for name, text in _origin(report).items() if name != "tokenizer" or words.kind == "text"},
        **_settings(report["settings"]),
        **_contents(report),
        "hash": f"spec {report['spec_sha256'][:12]}; all hashes whole: --json",
    }
    lines = [f"fastkd cache  {report['cache']}"]
    lines += [line for label, text in facts.items() for line in labelled(f"  {label}", text)]
    if read := report["arrays"]["shards_read"]:
        each = report["arrays"]["bytes_per_position"] | {"total": sum(report["arrays"]["bytes_per_position"].values())}
        whole = "all shards" if read == report["shards"] else f"{read} of {report['shards']:,} shards, evenly chosen"
        rows = [[f"  {name}", f"{size:.3f}", f"{size / (each['total'] or 1):.1%}"] for name, size in each.items()]
        lines += ["", f"Bytes per {words.position}, by array (from {whole})", *format_table(rows, gap=4)]
        lines.append("  other: the arrays' names, shapes and codecs; headers")
    if report["mass"]["mean"] is not None:
        rows = [[f"Counted {words.positions}", *report["mass"]]]
        for what, label in (("mass", "mass of the top-k"), ("entropy", "entropy in nats")):
            rows.append([f"  {label}", *("-" if x is None else f"{x:.4f}" for x in report[what].values())])
        lines += ["", *format_table(rows, gap=4)]
        if not _complete(report["settings"]):
            lines.append("  entropy: with everything outside the top-k entries as one outcome")
    if report["features"]:
        lines += ["", *features_lines(report["features"], words)]
    return "\n".join(printable(line) for line in [*lines, "", *_missing(report)])


def features_lines(features: dict[str, dict[str, Any]], words: Words = TEXT) -> list[str]:
    """A table of the features of a cache, and what each of them lacks."""
    rows = [["Features", "shape", "step", words.positions, "shards", "bytes each", "KL"]]
    notes: list[str] = []
    for name, found in features.items():
        each, kl, shape = found["bytes_per_position"], found["kl"], "x".join(map(str, found["shape"]))
        count = f"{found['stored_positions']:,}"
        size = "-" if each is None else f"{each:.1f}"
        rows.append(
            [
                f"  {name}",
                shape,
                f"{found['step']:g}",
                count,
                f"{found['shards']:,}",
                size,
                "-" if kl is None else f"{kl:.1e}",
            ]
        )
        if found["missing"]:
            notes += labelled(f"  {name}", are_missing(found["missing"]))
        elif not found["sealed"]:
            notes += labelled(f"  {name}", "not sealed")
    return [*format_table(rows), *notes] if features else []


def _origin(report: dict[str, Any]) -> dict[str, str]:
    """Teacher, tokenizer, data and notes: names first, then what they are, then the beginnings of hashes."""
    found = {name: _names_first(report[name]) for name in TEXTS}
    # `fastkd capture` notes the name of the teacher, which its fingerprint does not have
    what, _, name = report["notes"].partition(" ")
    if what == "teacher" and name and report["teacher"]:
        found |= {"teacher": f"{name}: {found['teacher']}", "notes": ""}
    return {name: text for name, text in found.items() if text or name != "notes"}


def _names_first(text: str) -> str:
    """A fingerprint with its hashes at the end, of which the first twelve digits are shown."""
    parts = HASH.sub(lambda found: found[1], text).split(", ")
    hashed = [bool(HASH.search(part)) for part in text.split(", ")]
    return ", ".join(part for last in (False, True) for part, own in zip(parts, hashed, strict=True) if own == last)


def _settings(settings: dict[str, Any]) -> dict[str, str]:
    codec, words = settings["codec"], words_of(settings["inputs"])
    cut = f", cut at {settings['mass']:g} of the mass" if settings["mass"] and settings["k"] else ""
    entries, draws = f"k = {settings['k']}{cut}", f"{settings['draws']} at T = {settings['draw_temperature']:g}"
    if _complete(settings):
        entries = f"all {settings['vocab_size']:,} {words.outcomes} (k = {settings['k']}), so targets are exact"
        draws += ", unused: nothing is outside the top-k entries"
    return {
        "vocabulary" if words.kind == "text" else "classes": f"{settings['vocab_size']:,}",
        "top-k entries": entries if settings["k"] else "none",
        "draws": draws if settings["draws"] else "none",
        "tails at T =": ", ".join(f"{t:g}" for t in settings["temperatures"]),
        "inputs": ", ".join(settings["inputs"]) or "none",
        "codec": f"{codec['name']} ({codec['compressor']} level {codec['level']}), step {codec['step']:.2g} nats",
    }


def _complete(settings: dict[str, Any]) -> bool:
    """Whether targets hold every outcome."""
    return bool(settings["k"] >= settings["vocab_size"] and not settings["mass"])


def _contents(report: dict[str, Any]) -> dict[str, str]:
    positions, counted = report["positions"], report["counted"]
    words = words_of(report["settings"]["inputs"])
    found = {"shards": f"{report['shards']:,}, of up to {report['settings']['shard_positions']:,} {words.positions}"}
    if words.kind == "text":
        found |= {"sequences": f"{report['sequences']:,}", "positions": f"{positions:,}"}
    else:
        found["examples"] = words.counted(positions, report["sequences"])
    if (held := report["held_out"])["documents"] is None:
        found["held out"] = f"not known: {held['why']}"
    elif not held["documents"]:
        found["held out"] = "nothing"
    elif words.kind == "text":
        found["held out"] = ", ".join(f"{held[name]:,} {name}" for name in ("documents", "sequences", "positions"))
    else:
        found["held out"] = words.counted(held["positions"], held["sequences"])
    if positions:
        if words.kind == "text" or counted != positions:
            found["counted"] = f"{counted:,}, {counted / positions:.1%} of the {words.positions}"
        found["bytes"] = f"{size_text(report['bytes'])}, {report['bytes_per_position']:.1f} per {words.position}"
    if counted:
        top_k, drawn = (report[name] / counted for name in ("head_entries", "draw_entries"))
        found["entries"] = f"{top_k:.2f} top-k and {drawn:.2f} drawn per {words.counted_position}"
    return found


def _missing(report: dict[str, Any]) -> list[str]:
    missing, lines = report["missing"], ["Missing"]
    for label, pairs in (("shards", missing["shards"]), ("sequences", missing["sequences"])):
        if pairs:
            lines += labelled(f"  {label}", f"{ranges(pairs)} ({sum(b - a + 1 for a, b in pairs):,} in all)")
    if gone := missing["objects"]:
        lines += labelled("  objects", f"of {numbered('shard', gone)}: in the manifest, but missing in the store")
    if not report["shards"]:
        lines.append("  everything: there are no shards yet")
    if len(lines) == 1:
        lines.append("  nothing up to the last shard")
    if not missing["listed"]:
        lines.append("  The store cannot be listed: this is from the manifest, without features.")
    overlaps = [f"shards {one:,} and {other:,} hold some of the same sequences" for one, other in report["overlaps"]]
    if late := report["not_in_manifest"]:
        lines += labelled("Not sealed in", f"{numbered('shard', late)}: written after the cache was sealed")
    foreign = [f"{key} is no shard's name" for key in report["foreign"]]
    for label, texts in (("Overlap", overlaps), ("Foreign", foreign)):
        shown = [*texts[:_MOST_LISTED], *([f"and {len(texts) - _MOST_LISTED:,} more"] * (len(texts) > _MOST_LISTED))]
        lines += [line for text in shown for line in labelled(label, text)]
    return lines
