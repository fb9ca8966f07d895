"""Sections of the language demo's report: cost and targets; and the commands that do the same."""

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from ..report.page import (
    Block,
    Card,
    Cards,
    Cell,
    Chart,
    Charts,
    Column,
    Line,
    Paragraph,
    Row,
    Section,
    Series,
    Table,
)
from ..report.runs import Run
from ..train.result import STUDENT
from ..utils.numbers import figures, seconds
from .artifacts import Json
from .deployed import FOLDER, QUANTIZE, TO, WINDOWS
from .job import Job
from .results import Target


def costs(run: Run, *, positions: int, overhead: Json) -> Section:
    """Time with and without a cache. positions: in the cache. overhead: seconds per position of the teacher alone
    ("bare") and of a capture ("capture")."""
    cached, trained = (sum(run.logged(name)[1]) for name in ("seconds", "positions"))
    note = (
        f"Measured in this run: {1 / overhead['bare']:,.0f} positions per second of the teacher alone, "
        f"{1 / overhead['capture']:,.0f} of a capture, and the steps of {run.name}. With a live teacher, the teacher's "
        f"forward on the {trained:,.0f} positions of the steps is added; the cost of a dense divergence is not. "
        "Evaluations take the same time in both cases and are not counted."
    )
    live = cached + trained * overhead["bare"]
    return cost_section(capture=positions * overhead["capture"], cached=cached, live=live, note=note)


def cost_section(*, capture: float, cached: float, live: float, note: str = "") -> Section:
    """Cumulative seconds by number of students. capture: of the capture, once. cached: to train a student from the
    cache. live: to train one with a live teacher. note: how the three were measured."""
    even = break_even(capture=capture, cached=cached, live=live)
    last = 10 if even is None else max(10, math.ceil(1.3 * even))
    x = list(range(last + 1))
    unit, name = (60.0, "minutes") if max(capture + cached * last, live * last) > 300 else (1.0, "seconds")
    lines = [
        Line(Series("live teacher for each student", 1), x, [live * n / unit for n in x], markers=last <= 20),
        # the cache is captured before the first student
        Line(Series("one cache", 0), x, [(capture + cached * n) / unit for n in x], markers=last <= 20),
    ]
    verdict, marks = "never", []
    if even is not None:
        verdict = f"{even} student{'s' * (even > 1)}"
        marks = [(float(even), (capture + cached * even) / unit, f"break-even: {verdict}")]
    caption = "The cache is cheaper to the right of the crossing; lower is better."
    chart = Chart("cost", "Total time", caption, "students", name, lines, marks=marks, from_zero=True)
    cards = [
        Card("the cache pays off after", verdict, "of the same size and number of steps"),
        Card("capture", seconds(capture), "once"),
        Card("a student from the cache", seconds(cached), "to train"),
        Card("a student with a live teacher", seconds(live), f"{figures(live / cached, 2)} times as long"),
    ]
    blocks: list[Block] = [Cards(cards), Charts([chart])]
    return Section("Cost by number of students", blocks + ([Paragraph(note, aside=True)] if note else []))


def break_even(*, capture: float, cached: float, live: float) -> int | None:
    """The number of students from which the cache takes no more time; None if it always takes more."""
    return max(1, math.ceil(capture / (live - cached) - 1e-9)) if live > cached else None


def targets_section(targets: Sequence[Target]) -> Section:
    """The targets, and whether they are met."""
    rows = []
    for t in targets:
        tone, mark = ("good", "met") if t.met else ("bad", "missed")
        rows.append(Row(t.name, [Cell(t.text, tone=tone, mark=mark), Cell(t.limit_text)]))
    return Section("Targets", [Table("", [Column("measured"), Column("at most")], rows)])


def commands(job: Job) -> list[list[str]]:
    """The command line of each stage."""
    cache, teacher, model = str(job.cache), ["--teacher", str(job.teacher)], options(job.model)
    places = ["--data", str(job.windows), "--out", cache]
    pruned = ["--drop-every", str(job.settings.cut), "--out", str(job.pruned)]
    students = ["fastkd", "train", "--student", str(job.pruned), "--cache", cache, "--out"]
    trainings = (
        [*students, str(job.out / name), *["--control"] * control, *options(how)]
        for name, how, control in job.trainings
    )
    student, exported = str(job.out / "healed" / STUDENT), str(job.out / FOLDER)
    measured = ["--cache", cache, "--positions", str(WINDOWS * job.sizes.window)]
    return [
        ["fastkd", "capture", *teacher, *places, *model, *options(job.capture)],
        ["fastkd", "inspect", cache],
        ["fastkd", "verify", cache, *teacher, *model],
        ["fastkd", "student", *teacher, *pruned],
        *trainings,
        ["fastkd", "report", *map(str, job.runs)],
        ["fastkd", "export", student, "--to", TO, "--quantize", QUANTIZE, "--out", exported, *measured],
        ["fastkd", "deploy-report", student, exported],
    ]


def options(settings: Any) -> list[str]:
    """Command-line options for the settings that are not at their defaults."""
    changed = {f.name: value for f in fields(settings) if (value := getattr(settings, f.name)) != f.default}
    return [word for name, value in changed.items() for word in (f"--{name.replace('_', '-')}", str(value))]
