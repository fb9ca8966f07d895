"""Run folders, read for a report, and several of them side by side.

    run.json          format "fastkd-run": settings, student (name, parameters, bytes, notes), caches (place and spec of
                      each), machine (versions and hardware), command, report (evaluation: the last held-out measures);
                      if measured separately: teacher (parameters, bytes, positions_per_second), and the student's
                      positions_per_second of inference
    metrics.jsonl     an object per step: step, loss, hard, soft, rate, ..., waiting (share of the step's time without
                      data), positions_per_second; and {"step", "evaluation": a summary} for evaluations
    evaluation.json   the last evaluation, by window (`Evaluation.to_json`), for paired differences; of a mixture of
                      caches evaluations.json, a list of them
    evaluations/      those on the way, for paired differences after each step
    control/          the run folder of the same student on hard labels alone
    without_features/ that of the same student without the features that it matches

Only run.json is required; the report omits what is missing. Damaged files raise ReportError, except that the last line
of metrics.jsonl may be incomplete: it is being written.
"""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ..cache.errors import said, type_name
from ..errors import NoRun, ReportError, StreamError, TrainError
from ..evaluate.api import Evaluation, compare
from ..evaluate.measures import distinct
from ..train import evaluations as kept
from ..train.held_out import EVALUATIONS
from ..train.verdict import combined
from ..utils.atomic import unsealed
from ..utils.intervals import Interval
from ..utils.words import KINDS, TEXT, Words, words_of
from .page import Series

Json = dict[str, Any]
FORMAT, VERSION = "fastkd-run", 1
_LINE = 80  # columns; longer commands are wrapped
_MOST_BYTES = 2**30  # of a file
_MOST_NAMED = 3  # of the runs in a folder


class Point(NamedTuple):
    """Held-out measures after a step."""

    step: int
    measures: Mapping[str, Interval]


@dataclass(frozen=True, eq=False)
class Run:
    """A run folder. name: on the page. document: run.json. steps: the logged steps. points: the evaluations.
    evaluation: the last one, by window. control: the control's run, if any. without_features: the run of the same
    student without features, if any. by_step: the evaluations by window after each step of which they were kept, if
    there was one cache. mixture: the last evaluations on each of several caches."""

    name: str
    document: Json
    steps: Sequence[Json] = ()
    points: Sequence[Point] = ()
    evaluation: Evaluation | None = None
    control: "Run | None" = None
    without_features: "Run | None" = None
    by_step: Mapping[int, Evaluation] = field(default_factory=dict)
    mixture: Sequence[Evaluation] = ()

    def part(self, *path: str) -> Any:
        """The value in run.json under these nested keys; None if it is missing."""
        value: Any = self.document
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def items(self, *path: str) -> list[Any]:
        """A list in run.json; empty if it is missing, or no list."""
        found = self.part(*path)
        return found if isinstance(found, list) else []

    def number(self, *path: str) -> float | None:
        """A number in run.json; None if it is missing, or no number."""
        return finite(self.part(*path))

    @property
    def caches(self) -> list[tuple[str, str]]:
        """Place and spec hash of each cache."""
        entries = [entry for entry in self.items("caches") if isinstance(entry, Mapping) and "place" in entry]
        return [(str(entry["place"]), str(entry.get("spec", ""))) for entry in entries]

    @property
    def words(self) -> Words:
        """The words for its data."""
        if self.evaluations:
            return self.evaluations[0].words
        inputs = [entry.get("inputs") for entry in self.items("caches") if isinstance(entry, Mapping)]
        return words_of(inputs[0]) if inputs and isinstance(inputs[0], list) else TEXT

    @property
    def command(self) -> str:
        """The command that was typed, wrapped if it is long; empty if unknown."""
        found = self.part("command")
        return found if isinstance(found, str) else in_lines([str(word) for word in self.items("command")])

    @property
    def evaluations(self) -> Sequence[Evaluation]:
        """The last evaluations, one for each cache."""
        return self.mixture if self.evaluation is None else [self.evaluation]

    @property
    def shares(self) -> list[float]:
        """The share of each of the `evaluations` in their means; equal ones if run.json does not say."""
        found = [finite(one.get("share")) for one in self.items("caches") if isinstance(one, Mapping)]
        known = [share for share in found if share is not None]
        return known if len(known) == len(self.evaluations) else [1.0] * len(self.evaluations)

    @cached_property
    def measures(self) -> Mapping[str, Interval]:
        """The last held-out measures."""
        if self.evaluations:
            return combined([one.intervals() for one in self.evaluations], self.shares)
        return self.points[-1].measures if self.points else measured(self.part("report", "evaluation"))

    @property
    def students(self) -> "list[Run]":
        """The run, and what was trained beside it: without features, and the control."""
        return [run for run in (self, self.without_features, self.control) if run is not None]

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


@dataclass(frozen=True, eq=False)
class Comparison:
    """Runs side by side: what every section is built from. runs: in the order of the page. command: the one that makes
    this report; empty if unknown. fetch: whether caches at URLs are opened. sweeps: beside them. of_sweeps: the sweeps'
    own runs."""

    runs: Sequence[Run]
    command: str = ""
    fetch: bool = False
    sweeps: Sequence[Any] = ()
    of_sweeps: Sequence[Run] = ()

    @property
    def students(self) -> list[tuple[Run, Series]]:
        """Each run, followed by what was trained beside it, with the line that stands for it."""
        found = [(student, student is not run) for run in self.runs for student in run.students]
        return [(student, Series(student.name, i, beside)) for i, (student, beside) in enumerate(found)]

    @property
    def trainings(self) -> list[Run]:
        """All runs: those of the page, what was trained beside them, and those of sweeps."""
        return [*(run for run, _ in self.students), *self.of_sweeps]

    @property
    def words(self) -> Words:
        """The words for the data of all runs: those for text, unless all are of one other kind."""
        kinds = {run.words.kind for run in self.trainings}
        return KINDS[kinds.pop()] if len(kinds) == 1 else TEXT

    @property
    def measures(self) -> list[str]:
        """The held-out measures of any training, in the order of the first that has them; see `distinct`."""
        return distinct({name: value.mean for name, value in run.measures.items()} for run in self.trainings)

    @property
    def exact(self) -> bool:
        """Whether the targets of all students hold every outcome; see `Evaluation.exact`."""
        each = [run.evaluations for run in self.trainings]
        return bool(each) and all(found and all(one.exact for one in found) for found in each)

    @property
    def evaluation(self) -> Evaluation | None:
        """The first evaluation of any student."""
        return next((run.evaluation for run, _ in self.students if run.evaluation is not None), None)


def paired_differences(ours: Run, theirs: Run | None) -> dict[str, Interval]:
    """Differences by measure, paired over windows; empty unless both were evaluated on the same windows."""
    if theirs is None or not ours.evaluations or len(ours.evaluations) != len(theirs.evaluations):
        return {}
    try:
        pairs = zip(ours.evaluations, theirs.evaluations, strict=True)
        return combined([compare(one, other) for one, other in pairs], ours.shares)
    except StreamError:
        return {}


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs of these folders, one for each, under distinct names. Raises ReportError."""
    return [read_run(folder, name) for folder, name in zip(folders, names_of(folders), strict=True)]


def check_format(path: Path, document: Mapping[str, Any], name: str, version: int) -> None:
    """Raise ReportError for a document of another format, or version of it; one that does not say has this one."""
    found = document.get("format", name), document.get("version", version)
    if found != (name, version):
        raise ReportError(
            f"{path}: got format {found[0]!r}, version {found[1]!r}; expected {name} {version}. Use the fastkd that "
            "wrote it."
        )


def read_run(folder: Path, name: str) -> Run:
    """One run. Raises NoRun if the folder has no run.json, ReportError if a file is damaged."""
    path = folder / "run.json"
    if not path.is_file():
        if not folder.exists():
            raise NoRun(f"{folder}: there is no such folder; expected one that `fastkd train` or `fastkd sweep` wrote.")
        wrote = f"that `fastkd train` or `fastkd sweep` wrote{_runs_in(folder)}"
        raise NoRun(f"{folder}: no run.json in it; expected a folder {wrote}.")
    document = read_document(path)
    check_format(path, document, FORMAT, VERSION)
    steps, points = _metrics(folder / "metrics.jsonl")
    beside = {
        part: read_run(folder / part, f"{name}, {part.replace('_', ' ')}")
        for part in ("control", "without_features")
        if (folder / part).is_dir() and "students" not in document  # of several students, see peers.py
    }
    last = read_evaluation(folder / "evaluation.json")
    several = read_mixture(folder / EVALUATIONS)
    return Run(name, document, steps, points, last, **beside, by_step=_by_step(folder), mixture=several)


def _runs_in(folder: Path) -> str:
    """The folders of runs within a folder, as the end of a sentence; "" if there are none."""
    names = ("run.json", "sweep.json")
    found = sorted({path.parent for name in names for at in ("*", "*/*") for path in folder.glob(f"{at}/{name}")})
    more = f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
    return f", such as {', '.join(map(str, found[:_MOST_NAMED]))}{more}" if found else ""


def measured(summary: Any) -> dict[str, Interval]:
    """Intervals from a summary, which has a number, or mean, low and high, for each measure."""
    found: dict[str, Interval] = {}
    for name, value in summary.items() if isinstance(summary, Mapping) else ():
        known = value if isinstance(value, Mapping) else {"mean": value}
        mean, high = finite(known.get("mean")), finite(known.get("high"))
        if mean is not None and name != "perplexity":
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
    # a resumed run has logged some steps twice: the later entries are valid
    steps: dict[int, Json] = {}
    points: dict[int, Point] = {}
    lines = _text(path).split("\n") if path.is_file() else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                break  # without a line end: it is still being written
            entry = None
        step = entry.get("step") if isinstance(entry, dict) else None
        if type(step) is not int or not 0 <= step < 2**53:
            raise ReportError(
                f"{path}, line {number}: got {line[:60]!r}; expected a JSON object with a step. Remove the line, or "
                "train again."
            )
        if "evaluation" in entry:
            points[step] = Point(step, measured(entry["evaluation"]))
        else:
            steps[step] = entry
    return [steps[i] for i in sorted(steps)], [points[i] for i in sorted(points)]


def read_evaluation(path: Path) -> Evaluation | None:
    """An evaluation by window; None if there is no such file. Raises ReportError if it is damaged."""
    try:
        return Evaluation.from_json(read_document(path)) if path.is_file() else None
    except StreamError as error:
        raise ReportError(f"{path}: {error}") from error


def read_mixture(path: Path) -> list[Evaluation]:
    """The evaluations by window of a mixture's caches; empty if there is no such file. Raises ReportError if it is
    damaged."""
    try:
        return [Evaluation.from_json(one) for one in _json(path)] if path.is_file() else []
    except (StreamError, TypeError) as error:
        raise ReportError(f"{path}: {error}") from error


def _by_step(folder: Path) -> dict[int, Evaluation]:
    try:
        found = {step: kept.read(folder, step) for step in kept.steps_of(folder)}
    except TrainError as error:
        raise ReportError(str(error)) from error
    return {step: each[0] for step, each in found.items() if len(each) == 1}


def read_document(path: Path) -> Json:
    """A JSON object. Raises ReportError if it is none, or damaged."""
    found = _json(path)
    if not isinstance(found, dict):
        raise ReportError(f"{path}: got {type_name(found)}; expected a JSON object. Restore it, or train again.")
    try:
        unsealed(found)
    except ValueError as error:
        raise ReportError(f"{path}: {said(error)}. Restore it, or train again.") from error
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path}: not JSON ({error}). Restore it, or train again.") from error


def _text(path: Path) -> str:
    try:
        if (size := path.stat().st_size) > _MOST_BYTES:
            raise ValueError(f"got {size:,} bytes; expected {_MOST_BYTES:,} at most")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: cannot be read ({error}). Restore it, or train again.") from error


def names_of(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many parent folders as make them distinct."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    twice = next(str(folder) for folder, p in zip(folders, parts, strict=True) if parts.count(p) > 1)
    raise ReportError(f"{twice}: given twice; give each run once.")
