"""A run's folder, read for its report.

    run.json          format "fastkd-run": settings, student (name, parameters, bytes, notes), caches (of each place and
                      spec), machine (versions and hardware), command, report (evaluation, the last held-out measures);
                      and where somebody measured them: teacher (parameters, bytes, positions_per_second), and of the
                      student positions_per_second of inference
    metrics.jsonl     an object a step: step, loss, hard, soft, rate, ..., waiting (the share of its time that the step
                      waited for data), positions_per_second; and {"step", "evaluation": a summary} for evaluations
    evaluation.json   the last evaluation, window by window (`Evaluation.to_json`): what pairs are made of
    control/          a run's folder: the same student on hard labels alone

Only run.json has to be there, and what is missing in it is left out of the report. What is there and damaged is an
error that names it. A line of metrics.jsonl that is being written is no damage.
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
_LINE = 80  # columns of a command on one line


@dataclass(frozen=True, eq=False)
class Point:
    """Held-out measures after a step."""

    step: int
    measures: Mapping[str, Interval]


@dataclass(frozen=True, eq=False)
class Run:
    """A run as its folder tells it. name: what it is called on the page. document: run.json. steps: what was logged of
    each. points: its evaluations. measures: the last ones. evaluation: window by window. control: None where there is
    none."""

    name: str
    folder: Path
    document: Json
    steps: Sequence[Json] = ()
    points: Sequence[Point] = ()
    measures: Mapping[str, Interval] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    control: "Run | None" = None

    def part(self, *path: str) -> Any:
        """What run.json has under these keys, one within another; None where it has nothing."""
        value: Any = self.document
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def number(self, *path: str) -> float | None:
        """A number of run.json; None where there is none."""
        return finite(self.part(*path))

    @property
    def caches(self) -> list[tuple[str, str]]:
        """Of each cache its place, and the hash of its spec."""
        found = self.part("caches")
        entries = [entry for entry in found if isinstance(entry, Mapping)] if isinstance(found, list) else []
        return [(str(entry["place"]), str(entry.get("spec", ""))) for entry in entries if "place" in entry]

    @property
    def notes(self) -> list[str]:
        """What was noted of the student."""
        found = self.part("student", "notes")
        return [str(note) for note in found] if isinstance(found, list) else []

    @property
    def hardware(self) -> str:
        """What it was trained on; empty where that was not kept."""
        machine = {n: self.part("machine", n) for n in ("gpu", "machine", "threads", "processes")}
        words = [str(machine["gpu"] or machine["machine"] or "")]
        if machine["threads"] and not machine["gpu"]:
            words.append(f"{machine['threads']} threads")
        if (finite(machine["processes"]) or 1) > 1:
            words.append(f"{machine['processes']} processes")
        return ", ".join(filter(None, words))

    @property
    def command(self) -> str:
        """What was typed, an option a line where it is long; empty where that was not kept."""
        found = self.part("command")
        return in_lines(list(map(str, found))) if isinstance(found, list) else found if isinstance(found, str) else ""

    def logged(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of what was logged under a name; only where it was a number."""
        pairs = [(int(s["step"]), value) for s in self.steps if (value := finite(s.get(name))) is not None]
        return [step for step, _ in pairs], [value for _, value in pairs]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs of these folders, each under a name of its own. Raises ReportError."""
    return [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def read_run(folder: Path, name: str) -> Run:
    """One run. Raises ReportError where its folder is none of a run, or holds damaged files."""
    path = folder / "run.json"
    if not path.is_file():
        raise NoRun(f"{folder}: there is no run.json in it; the folder that `fastkd train` wrote is needed.")
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
    """Intervals from a summary: of each measure a number, or its mean, low and high."""
    found: dict[str, Interval] = {}
    for name, value in summary.items() if isinstance(summary, Mapping) else ():
        mean = finite(value.get("mean") if isinstance(value, Mapping) else value)
        if mean is None or name == "perplexity":
            continue
        high = finite(value.get("high")) if isinstance(value, Mapping) else None
        found[str(name)] = Interval(mean, math.inf if high is None else high - mean)
    return found


def in_lines(arguments: Sequence[str]) -> str:
    """A command for a shell, an option a line where it is long."""
    whole = shlex.join(arguments)
    if len(whole) <= _LINE:
        return whole
    return " ".join(f"\\\n    {shlex.quote(a)}" if a.startswith("--") else shlex.quote(a) for a in arguments)


def finite(value: Any) -> float | None:
    """A number, or None for all else: text, true and false, NaN, infinities."""
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
    text = _text(path)
    *lines, last = text.split("\n")
    if last:
        lines.append(last)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines) and last:
                break  # it is being written
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
    # a run that was resumed has logged some steps twice: the later ones are what went on
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
        raise ReportError(f"{path}: this is not JSON ({error}). Restore it, or train again.") from error
    if not isinstance(found, dict):
        raise ReportError(f"{path}: got {type(found).__name__}; expected a JSON object. Restore it, or train again.")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: it cannot be read ({error}). Restore it, or train again.") from error


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of those above as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        twice = next(str(f) for f, p in zip(folders, parts, strict=True) if parts.count(p) > 1)
        raise ReportError(f"{twice}: found twice among the runs; name each once.")
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]
