"""Sections of the language demo's report: cost, verification, and the commands that do the same."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from ..report.page import Code, Paragraph, Section
from ..report.runs import Run, in_lines
from ..report.sections.cost import cost_section
from .artifacts import Json
from .job import Job


def costs(run: Run, *, positions: int, overhead: Json) -> Section:
    """Time with and without a cache. positions: in the cache. overhead: seconds per position of the teacher alone
    ("bare") and of a capture ("capture")."""
    cached, trained = (sum(run.logged(name)[1]) for name in ("seconds", "positions"))
    return cost_section(
        capture=positions * overhead["capture"],
        cached=cached,
        live=cached + trained * overhead["bare"],
        note=(
            f"Measured in this run: {1 / overhead['bare']:,.0f} positions per second of the teacher alone, "
            f"{1 / overhead['capture']:,.0f} of a capture, and the steps of {run.name}. With a live teacher, the "
            f"teacher's forward on the {trained:,.0f} positions of the steps is added; the cost of a dense divergence "
            "is not. Evaluations take the same time in both cases and are not counted."
        ),
    )


def verification(flipped: str, problems: Sequence[str]) -> Section:
    """The flipped bit, and what verify reported."""
    text = f"In a copy of the cache, one bit of {flipped} was flipped. `fastkd verify` names the shard:"
    return Section("Verification", [Paragraph(text), Code("\n".join(problems))])


def by_hand(job: Job) -> Section:
    """The demo as commands."""
    text = "The demo as commands. The student is the teacher's folder with layers removed."
    return Section("The same by hand", [Paragraph(text), Code("\n".join(map(in_lines, commands(job))))])


def commands(job: Job) -> list[list[str]]:
    """The command line of each stage."""
    cache, teacher, model = str(job.cache), ["--teacher", str(job.teacher)], options(job.model)
    places = ["--data", str(job.windows), "--out", cache]
    students = ["fastkd", "train", "--student", str(job.pruned), "--cache", cache, "--out"]
    return [
        ["fastkd", "capture", *teacher, *places, *model, *options(job.capture)],
        ["fastkd", "inspect", cache],
        ["fastkd", "verify", cache, *teacher, *model],
        *([*students, str(job.out / t.name), *["--control"] * t.control, *options(t.settings)] for t in job.trainings),
        ["fastkd", "report", *map(str, job.runs)],
    ]


def options(settings: Any) -> list[str]:
    """Command-line options for the settings that are not at their defaults."""
    found: list[str] = []
    for field in fields(settings):
        if (value := getattr(settings, field.name)) != field.default:
            found += [f"--{field.name.replace('_', '-')}", str(value)]
    return found
