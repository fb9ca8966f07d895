"""A report, made: folders are read, caches looked at, and the page written."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..cache import CacheError, open_cache
from ..errors import NoRun, ReportError
from ..utils.inspect_cache import inspect_cache
from ..utils.numbers import prefixed
from ..utils.text import without_credentials
from .demo_sections import cache_section
from .html import to_html
from .page import Page, Section
from .plots import png
from .runs import Run, in_lines, read_runs
from .sections import (
    curves,
    headline,
    held_out,
    reproduce,
    settings,
    speed,
    students,
)


def make_report(
    folders: Sequence[Path],
    out: Path | None = None,
    *,
    pngs: bool = False,
    more: Sequence[Section] = (),
    title: str = "",
    command: str = "",
) -> dict[str, Any]:
    """Write the report of these runs; what was written, as JSON knows it.

    out: the page; None: report.html in the first run's folder. pngs: beside it, `<its name>-<chart>.png` of each chart.
    more: sections after the table of students (`demo_sections.py`). title: of the page. command: what makes this page
    again, where it is not `fastkd report`. Raises ReportError.
    """
    if not folders:
        raise NoRun("runs: got none; expected the folder of at least one run.")
    runs = read_runs(folders)
    out = folders[0] / "report.html" if out is None else out
    command = command or in_lines(["fastkd", "report", *map(str, folders), "--out", str(out), *["--png"] * pngs])
    reports, notes = caches(runs)
    page = page_of(runs, reports, notes, more=more, title=title, command=command)
    files = [out]
    _write(out, to_html(page).encode())
    if pngs:
        for chart in page.charts:
            path = out.with_name(f"{out.stem}-{chart.name}.png")
            _write(path, png(chart))
            files.append(path)
    return {"report": str(out), "files": [str(path) for path in files], "runs": [run.name for run in runs]}


def page_of(
    runs: Sequence[Run],
    caches: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
    *,
    more: Sequence[Section] = (),
    title: str = "",
    command: str = "",
) -> Page:
    """The page of some runs. caches: what `inspect_cache` says of theirs; notes: of those that were not to be had."""
    several = len(runs) > 1
    found = [
        headline(runs[0], runs[0].name if several else ""),
        held_out(runs),
        *more,
        curves(runs),
        speed(runs),
        settings(runs),
        cache_section(caches, notes),
        reproduce(runs, command),
    ]
    parts = [
        f"{run.name} ({prefixed(n)} parameters)" if (n := run.number("student", "parameters")) else run.name
        for run in runs
    ]
    controls = sum(run.control is not None for run in runs)
    lead = "Distilled from a cache of what the teacher said: " + ", ".join(parts) + "."
    if controls:
        lead += " Dashed, beside each: its control, the same student on hard labels alone."
    return Page(
        title=title or (f"{len(runs)} runs compared" if several else f"Distillation: {runs[0].name}"),
        lead=lead,
        sections=[section for section in found if section is not None],
        foot="Made by fastkd report. This page is one file and asks nothing of any server.",
    )


def caches(runs: Sequence[Run]) -> tuple[list[dict[str, Any]], list[str]]:
    """What is to be said of the runs' caches, each once; and notes on those that cannot be looked at."""
    reports: list[dict[str, Any]] = []
    notes: list[str] = []
    seen: set[str] = set()
    everyone = [(run, *cache) for run, _ in students(runs) for cache in run.caches]
    for run, place, spec in everyone:
        if (spec or place) in seen:
            continue
        seen.add(spec or place)
        shown = without_credentials(place)
        try:
            report = inspect_cache(open_cache(place))
        except (CacheError, OSError) as error:
            notes.append(f"The cache of {run.name}, {shown}, cannot be looked at: {without_credentials(str(error))}")
            continue
        if spec and report["spec_sha256"] != spec:
            notes.append(f"What lies at {shown} now is another cache than the one that {run.name} was trained from.")
            continue
        reports.append(report)
    return reports, notes


def _write(path: Path, data: bytes) -> None:
    """A file, whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ReportError(f"{path}: it cannot be written ({error}). Choose another place with --out.") from error
