"""Run folders, read for a report.

    run.json          format "fastkd-run": settings, student (name, parameters, bytes, notes), caches (place and spec of
                      each), machine (versions and hardware), command, report (evaluation: the last held-out measures);
                      if measured separately: teacher (parameters, bytes, positions_per_second), and the student's
                      positions_per_second of inference
    metrics.jsonl     an object per step: step, loss, hard, soft, rate, ..., waiting (share of the step's time without
                      data), positions_per_second; and {"step", "evaluation": a summary} for evaluations
    evaluation.json   the last evaluation, by window (`Evaluation.to_json`), for paired differences
    control/          the run folder of the same student on hard labels alone

Only run.json is required; the report omits what is missing. Damaged files raise ReportError, except that the last line
of metrics.jsonl may be incomplete: it is being written.
"""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import NoRun, ReportError, StreamError
from ..evaluate.api import Evaluation
from ..utils.intervals import Interval

Json = dict[str, Any]
FORMAT, VERSION = "fastkd-run", 1
_LINE = 80  # columns; longer commands are wrapped


@dataclass(frozen=True, eq=False)
class Point:
    """Held-out measures after a step."""

    step: int
    measures: Mapping[str, Interval]


@dataclass(frozen=True, eq=False)
class Run:
    """A run folder. name: on the page. document: run.json. steps: the logged steps. points: the evaluations. measures:
    of the last evaluation. evaluation: the same by window. control: the control's run, if any."""

    name: str
    folder: Path
    document: Json
    steps: Sequence[Json] = ()
    points: Sequence[Point] = ()
    measures: Mapping[str, Interval] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    control: "Run | None" = None

    def part(self, *path: str) -> Any:
        """The value in run.json under these nested keys; None if it is missing."""
        value: Any = self.document
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def number(self, *path: str) -> float | None:
        """A number in run.json; None if it is missing, or no number."""
        return finite(self.part(*path))

    @property
    def caches(self) -> list[tuple[str, str]]:
        """Place and spec hash of each cache."""
        found = self.part("caches")
        entries = [entry for entry in found if isinstance(entry, Mapping)] if isinstance(found, list) else []
        return [(str(entry["place"]), str(entry.get("spec", ""))) for entry in entries if "place" in entry]

    @property
    def notes(self) -> list[str]:
        """Notes about the student."""
        found = self.part("student", "notes")
        return [str(note) for note in found] if isinstance(found, list) else []

    @property
    def hardware(self) -> str:
        """Hardware of the training; empty if unknown."""
        machine = {n: self.part("machine", n) for n in ("gpu", "machine", "threads", "processes")}
        words = [str(machine["gpu"] or machine["machine"] or "")]
        if machine["threads"] and not machine["gpu"]:
            words.append(f"{machine['threads']} threads")
        if (finite(machine["processes"]) or 1) > 1:
            words.append(f"{machine['processes']} processes")
        return ", ".join(filter(None, words))

    @property
    def command(self) -> str:
        """The command that was typed, wrapped if it is long; empty if unknown."""
        found = self.part("command")
        return in_lines(list(map(str, found))) if isinstance(found, list) else found if isinstance(found, str) else ""

    def logged(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a logged quantity, where it is a number."""
        pairs = [(int(s["step"]), value) for s in self.steps if (value := finite(s.get(name))) is not None]
        return [step for step, _ in pairs], [value for _, value in pairs]

    @property
    def waiting(self) -> float | None:
        """Share of the steps' time in which no batch was ready; None if it was not logged."""
        pairs = [(finite(step.get("waiting")), finite(step.get("seconds"))) for step in self.steps]
        known = [(share, seconds) for share, seconds in pairs if share is not None and seconds is not None]
        total = sum(seconds for _, seconds in known)
        return sum(share * seconds for share, seconds in known) / total if total > 0 else None


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs of these folders, under distinct names. Raises ReportError."""
    return [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def read_run(folder: Path, name: str) -> Run:
    """One run. Raises NoRun if the folder has no run.json, ReportError if a file is damaged."""
    path = folder / "run.json"
    if not path.is_file():
        raise NoRun(f"{folder}: no run.json in it; expected a folder written by `fastkd train`.")
    document = _document(path)
    made_by = document.get("format", FORMAT), document.get("version", VERSION)
    if made_by != (FORMAT, VERSION):
        raise ReportError(
            f"{path}: got format {made_by[0]!r}, version {made_by[1]!r}; expected {FORMAT} {VERSION}. Use "
            "the fastkd that wrote it."
        )
    steps, points = _metrics(folder / "metrics.jsonl")
    evaluation = _evaluation(folder / "evaluation.json")
    if evaluation is not None:
        measures: Mapping[str, Interval] = evaluation.intervals()
    elif points:
        measures = points[-1].measures
    else:
        report = document.get("report")
        measures = measured(report.get("evaluation") if isinstance(report, Mapping) else None)
    control = folder / "control"
    return Run(
        name=name,
        folder=folder,
        document=document,
        steps=steps,
        points=points,
        measures=measures,
        evaluation=evaluation,
        control=read_run(control, f"{name}, control") if control.is_dir() else None,
    )


def measured(summary: Any) -> dict[str, Interval]:
    """Intervals from a summary, which has a number, or mean, low and high, for each measure."""
    found: dict[str, Interval] = {}
    for name, value in summary.items() if isinstance(summary, Mapping) else ():
        mean = finite(value.get("mean") if isinstance(value, Mapping) else value)
        if mean is None or name == "perplexity":
            continue
        high = finite(value.get("high")) if isinstance(value, Mapping) else None
        found[str(name)] = Interval(mean, math.inf if high is None else high - mean)
    return found


def in_lines(arguments: Sequence[str]) -> str:
    """A command for a shell; a long one with an option per line."""
    whole = shlex.join(arguments)
    if len(whole) <= _LINE:
        return whole
    return " ".join(f"\\\n    {shlex.quote(a)}" if a.startswith("--") else shlex.quote(a) for a in arguments)


def finite(value: Any) -> float | None:
    """A finite number as float; None for anything else, booleans included."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _metrics(path: Path) -> tuple[list[Json], list[Point]]:
    steps: list[Json] = []
    points: list[Point] = []
    if not path.is_file():
        return steps, points
    *lines, last = _text(path).split("\n")
    if last:
        lines.append(last)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines) and last:
                break  # it is still being written
            raise ReportError(
                f"{path}, line {number}: got {line[:60]!r}, which is not JSON. Remove the line, or train again."
            ) from error
        step = entry.get("step") if isinstance(entry, dict) else None
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 2**53:
            raise ReportError(
                f"{path}, line {number}: got {line[:60]!r}; expected an object with a step. Remove the line, or "
                "train again."
            )
        if "evaluation" in entry:
            points.append(Point(step, measured(entry["evaluation"])))
        else:
            steps.append(entry)
    # a resumed run has logged some steps twice: the later entries are valid
    by_step, by_point = {s["step"]: s for s in steps}, {p.step: p for p in points}
    return [by_step[i] for i in sorted(by_step)], [by_point[i] for i in sorted(by_point)]


def _evaluation(path: Path) -> Evaluation | None:
    if not path.is_file():
        return None
    try:
        return Evaluation.from_json(_document(path))
    except StreamError as error:
        raise ReportError(f"{path}: {error}") from error


def _document(path: Path) -> Json:
    try:
        found = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path}: not JSON ({error}). Restore it, or train again.") from error
    if not isinstance(found, dict):
        raise ReportError(f"{path}: got {type(found).__name__}; expected a JSON object. Restore it, or train again.")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: cannot be read ({error}). Restore it, or train again.") from error


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many parent folders as make them distinct."""
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        twice = next(str(f) for f, p in zip(folders, parts, strict=True) if parts.count(p) > 1)
        raise ReportError(f"{twice}: given twice; give each run once.")
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]
