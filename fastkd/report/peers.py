"""Runs of several students that were trained together, as `fastkd mutual` leaves them: a run of the page for each.

run.json            "students": name, parameters and bytes of each, by name; report.students: its last measures
metrics.jsonl       NAME/hard, NAME/soft, ..., and in evaluations NAME/cross_entropy, ensemble/cross_entropy, ...
evaluation-NAME.json, evaluation-ensemble.json      the last evaluations, by window; of a mixture evaluations-NAME.json
control/NAME/       the run of the same student alone, on hard labels
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .runs import Json, Point, Run, read_evaluation, read_mixture, read_run

ENSEMBLE = "ensemble"


def students_of(run: Run, folder: Path) -> list[Run]:
    """The runs of the students that were trained in this one, and what is known of their ensemble; of a run of one
    student, itself. Raises ReportError."""
    about = run.part("students")
    if not isinstance(about, Mapping) or not about:
        return [run]
    found = [_student(run, folder, str(name), dict(one)) for name, one in about.items() if isinstance(one, Mapping)]
    sizes = {key: sum(one.number("student", key) or 0 for one in found) for key in ("parameters", "bytes")}
    ensemble = _student(run, folder, ENSEMBLE, {"name": f"the mean of {', '.join(about)}", **sizes})
    return [*found, *([replace(ensemble, steps=())] if ensemble.points or ensemble.evaluations else [])]


def _student(run: Run, folder: Path, name: str, about: Json) -> Run:
    control = folder / "control" / name
    label = f"{run.name}, {name}"
    measures = run.part("report", "students", name, "evaluation") or run.part("report", name)
    several = read_mixture(folder / f"evaluations-{name}.json")
    report = {**(run.part("report") or {}), "evaluation": measures if isinstance(measures, Mapping) else {}}
    return Run(
        label,
        {**run.document, "student": about, "report": report},
        [_own(step, name) for step in run.steps],
        [Point(at, own) for at, found in run.points if (own := _prefixed(found, name))],
        None if several else read_evaluation(folder / f"evaluation-{name}.json"),
        mixture=several,
        control=read_run(control, f"{label}, control") if control.is_dir() else None,
    )


def _own(step: Json, name: str) -> Json:
    """A logged step as it is of one student: what all share, and what is its own, by its plain name."""
    return {key: value for key, value in step.items() if "/" not in key} | _prefixed(step, name)


def _prefixed(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key.removeprefix(f"{name}/"): value for key, value in values.items() if key.startswith(f"{name}/")}
