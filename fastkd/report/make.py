"""Reports: folders of runs are read, and a page is written."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import NoRun, ReportError
from ..utils.atomic import write_file
from .page import Page, Section
from .peers import students_of
from .plots import png
from .render import to_html
from .runs import Comparison, Run, in_lines, read_runs
from .sections import build_sections


def make_report(
    folders: Sequence[Path],
    out: Path | None = None,
    *,
    pngs: bool = False,
    fetch: bool = False,
    more: Sequence[Section] = (),
    title: str = "",
    command: str = "",
) -> dict[str, Any]:
    """Write the report of some runs. Returns what was written, for JSON.

    out: file of the page; None: report.html in the first run's folder. pngs: also write every chart as
    `<name of the page>-<name of the chart>.png`. fetch: also open caches at URLs that the runs name. more: sections
    after the held-out measures. title: of the page. command: how to make this page again; "": by `fastkd report`.
    Raises ReportError.
    """
    if not folders:
        raise NoRun("runs: got none; expected the folder of at least one run.")
    runs = [one for run, folder in zip(read_runs(folders), folders, strict=True) for one in students_of(run, folder)]
    out = folders[0] / "report.html" if out is None else out
    flags = ["--png"] * pngs + ["--fetch"] * fetch
    command = command or in_lines(["fastkd", "report", *map(str, folders), "--out", str(out), *flags])
    page = page_of(runs, more=more, title=title, command=command, fetch=fetch)
    files = {out: to_html(page).encode()}
    if pngs:
        files |= {out.with_name(f"{out.stem}-{chart.name}.png"): png(chart) for chart in page.charts}
    for path, data in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, partial(Path.write_bytes, data=data), sync=False)
        except OSError as error:
            raise ReportError(f"{path}: cannot be written ({error}). Choose another file with --out.") from error
    return {"report": str(out), "files": [str(path) for path in files], "runs": [run.name for run in runs]}


def page_of(
    runs: Sequence[Run], *, more: Sequence[Section] = (), title: str = "", command: str = "", fetch: bool = False
) -> Page:
    """The page of some runs; see `make_report`."""
    how = "" if any("live" in run.document for run in runs) else " from cached outputs of the teacher"
    lead = f"Distilled{how}: {', '.join(run.name for run in runs)}."
    if any(run.control is not None for run in runs):
        lead += " Dashed lines: the controls, the same students trained on hard labels alone"
        lead += ", or without features." if any(run.without_features is not None for run in runs) else "."
    return Page(
        title=title or (f"{len(runs)} runs compared" if len(runs) > 1 else f"Distillation: {runs[0].name}"),
        lead=lead,
        sections=build_sections(Comparison(runs, command, fetch), more),
        foot="Made by fastkd report. This page is one file and loads nothing from the network.",
    )
