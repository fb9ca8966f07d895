"""Reports: folders of runs and of sweeps are read, and a page is written."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import NoRun, ReportError
from ..utils.atomic import write_file
from ..utils.output_guard import check_file
from .page import Page, Section
from .peers import students_of
from .plots import png
from .render import to_html
from .runs import Comparison, Run, in_lines, names_of, read_run
from .sections import build_sections
from .sweeps import Sweep, is_sweep, read_sweep


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
    """Write the report of some runs and sweeps. Returns what was written, for JSON.

    out: file of the page; None: report.html in the first folder. pngs: also write every chart as
    `<name of the page>-<name of the chart>.png`. fetch: also open caches at URLs that the runs name. more: sections
    after the held-out measures. title: of the page. command: how to make this page again; "": by `fastkd report`.
    Raises ReportError.
    """
    if not folders:
        raise NoRun("runs: got none; expected the folder of at least one run.")
    out = folders[0] / "report.html" if out is None else out
    check_file(out, "out", ReportError)
    runs: list[Run] = []
    sweeps: list[Sweep] = []
    for folder, name in zip(folders, names_of(folders), strict=True):
        if is_sweep(folder):
            sweeps.append(read_sweep(folder, name))
        else:
            runs += students_of(read_run(folder, name), folder)
    flags = ["--png"] * pngs + ["--fetch"] * fetch
    command = command or in_lines(["fastkd", "report", *map(str, folders), "--out", str(out), *flags])
    page = page_of(runs, sweeps, more=more, title=title, command=command, fetch=fetch)
    files = {out: to_html(page).encode()}
    if pngs:
        files |= {out.with_name(f"{out.stem}-{chart.name}.png"): png(chart) for chart in page.charts}
    for path, data in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, partial(Path.write_bytes, data=data), sync=False)
        except OSError as error:
            raise ReportError(f"{path}: cannot be written ({error}). Choose another file with --out.") from error
    return {
        "report": str(out),
        "files": [str(path) for path in files],
        "runs": [run.name for run in runs],
        "sweeps": [sweep.name for sweep in sweeps],
    }


def page_of(
    runs: Sequence[Run],
    sweeps: Sequence[Sweep] = (),
    *,
    more: Sequence[Section] = (),
    title: str = "",
    command: str = "",
    fetch: bool = False,
) -> Page:
    """The page of some runs and sweeps; see `make_report`."""
    names = [sweep.name for sweep in sweeps] + [run.name for run in runs]
    how = "" if any("live" in run.document for run in runs) else " from cached outputs of the teacher"
    lead = f"Distilled{how}: {', '.join(names)}."
    if any(run.control is not None for run in runs):
        lead += " Dashed lines: the controls, the same students trained on hard labels alone"
        lead += ", or without features." if any(run.without_features is not None for run in runs) else "."
    return Page(
        title=title or _title(runs, sweeps),
        lead=lead,
        sections=build_sections(Comparison(runs, command, fetch, sweeps, [r for s in sweeps for r in s.runs]), more),
        foot="Made by fastkd report. This page is one file and loads nothing from the network.",
    )


def _title(runs: Sequence[Run], sweeps: Sequence[Sweep]) -> str:
    if not sweeps:
        return f"{len(runs)} runs compared" if len(runs) > 1 else f"Distillation: {runs[0].name}"
    if not runs:
        return f"{len(sweeps)} sweeps" if len(sweeps) > 1 else f"Sweep: {sweeps[0].name}"
    return f"{', '.join(sweep.name for sweep in sweeps)} and {len(runs)} run{'s' * (len(runs) > 1)}"
