"""Recordings as Markdown: hardware, versions and every row, also those that miss their limits."""

from collections.abc import Sequence
from itertools import groupby

from fastkd.bench.hardware import named
from fastkd.bench.load import load_text
from fastkd.bench.suites import SUITES
from fastkd.bench.table import Recording, Row

INTRO = """# Results

Made by `fastkd bench`. Ratios are medians over rounds that alternate in one process, with the 20th and 80th percentile
in brackets. **MISSED**: the limit is missed on this hardware. A dash: it could not be run, for the reason given.
"""


def latest(recordings: Sequence[Recording]) -> list[Recording]:
    """The last recording of each suite, size and machine, ordered by suite."""
    found = {(r.suite, named(dict(r.hardware)), r.size): r for r in recordings}
    order = list(SUITES)
    return sorted(found.values(), key=lambda r: order.index(r.suite) if r.suite in order else len(order))


def cases_of(recording: Recording) -> list[tuple[str, list[Row]]]:
    """The rows by case."""
    return [(case, list(rows)) for case, rows in groupby(recording.rows, key=lambda row: row.case)]


def markdown(recordings: Sequence[Recording]) -> str:
    """The whole file."""
    parts = [INTRO]
    for recording in latest(recordings):
        suite = SUITES.get(recording.suite)
        versions = ", ".join(f"{name} {version}" for name, version in recording.versions.items())
        machine = f"{named(dict(recording.hardware))}; {versions}; {recording.size} sizes, {recording.seconds:.0f} s."
        load = f"\nThe machine: {load_text(recording.load)}.\n" if recording.load else ""
        parts.append(f"\n## {recording.suite}\n\n{suite.title if suite else ''}.\n\n{machine}\n{load}")
        for case, rows in cases_of(recording):
            parts.append(f"\n### {case}\n\n| | ratio or figure | limit | |\n|---|---|---|---|\n")
            parts += [f"| {' | '.join(map(_escaped, _cells(row)))} |\n" for row in rows]
    return "".join(parts)


def _cells(row: Row) -> tuple[str, str, str, str]:
    verdict = "**MISSED**" if row.verdict == "MISSED" else row.verdict
    return row.name, figure_text(row), f"{row.limit} {verdict}".strip(), ", ".join(row.details())


def figure_text(row: Row) -> str:
    """The ratio or value, with its percentiles."""
    if row.figure is None:
        return "-"
    unit = "x" if row.ratio is not None else f" {row.unit}"
    spread = f" ({row.p20:.4g} to {row.p80:.4g})" if row.p20 is not None else ""
    return f"{row.figure:.4g}{unit}{spread}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
