"""Recordings as text: tables with the hardware, every row of them, those that lose too."""

from collections.abc import Sequence
from itertools import groupby

from fastkd.bench.hardware import named
from fastkd.bench.suites import SUITES
from fastkd.bench.table import Recording, Row

INTRO = """# Results

Made by `fastkd bench`. Ratios are medians over rounds in which what is compared takes turns in one process; in brackets
the 20th and 80th percentile. **MISSED**: a limit that does not hold here. A dash: what could not be run, and why.
"""


def latest(recordings: Sequence[Recording]) -> list[Recording]:
    """The last of each suite, size and machine, suite by suite."""
    found = {(r.suite, named(dict(r.hardware)), r.size): r for r in recordings}
    order = list(SUITES)
    return sorted(found.values(), key=lambda r: order.index(r.suite) if r.suite in order else len(order))


def cases_of(recording: Recording) -> list[tuple[str, list[Row]]]:
    """Its rows, case by case."""
    return [(case, list(rows)) for case, rows in groupby(recording.rows, key=lambda row: row.case)]


def markdown(recordings: Sequence[Recording]) -> str:
    """All of it."""
    parts = [INTRO]
    for recording in latest(recordings):
        suite = SUITES.get(recording.suite)
        parts.append(f"\n## {recording.suite}\n\n{suite.title if suite else ''}.\n\n{_machine(recording)}\n")
        for case, rows in cases_of(recording):
            parts.append(f"\n### {case}\n\n| | ratio or figure | limit | |\n|---|---|---|---|\n")
            parts += [f"| {' | '.join(_escaped(cell) for cell in _cells(row))} |\n" for row in rows]
    return "".join(parts)


def _machine(recording: Recording) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in recording.versions.items())
    return f"{named(dict(recording.hardware))}; {versions}; {recording.size} sizes, {recording.seconds:.0f} s."


def _cells(row: Row) -> tuple[str, str, str, str]:
    verdict = "**MISSED**" if row.verdict == "MISSED" else row.verdict
    return row.name, figure_text(row), f"{row.limit} {verdict}".strip(), ", ".join(absolute(row))


def figure_text(row: Row) -> str:
    """A row's figure, and its percentiles."""
    if row.figure is None:
        return "-"
    unit = "x" if row.ratio is not None else f" {row.unit}"
    spread = f" ({row.p20:.4g} to {row.p80:.4g})" if row.p20 is not None else ""
    return f"{row.figure:.4g}{unit}{spread}"


def absolute(row: Row) -> list[str]:
    """What a ratio is over, and the absolute figure; the note."""
    words = [f"over {row.over}"] if row.over else []
    if row.ratio is not None and row.value is not None:
        words.append(f"{row.value:.4g} {row.unit}")
    return words + ([row.note] if row.note else [])


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
