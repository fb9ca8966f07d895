"""The results of several generations: each student against the control, and against the one before."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import TrainError
from ..evaluate.api import Evaluation, compare
from ..evaluate.measures import LOG, MEASURES, distinct, printed_in
from ..train.verdict import verdict
from ..utils.atomic import read_sealed
from ..utils.intervals import NO_INTERVAL, Interval, to_json
from ..utils.numbers import difference_text
from ..utils.signals import DONE, WORK_REMAINS
from ..utils.text import format_table
from ..utils.words import KINDS, counted

GENERATIONS = "generations.json"
CONTROL, BEFORE = "control", "before"


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained student. name: "generation 2", "control" or "ensemble". says: what it learned from. run: its folder.
    evaluation: on the held-out split of the first cache; None if there is none."""

    name: str
    says: str
    run: str
    seed: int
    evaluation: Evaluation | None = None


@dataclass(frozen=True, eq=False)
class Member:
    """A student in the report. values: its measures, with intervals. against: its measures minus those of the control,
    and of the generation before (of the ensemble's student: the last one), paired by window."""

    name: str
    says: str
    run: str
    seed: int
    values: Mapping[str, Interval] = field(default_factory=dict)
    against: Mapping[str, Mapping[str, Interval]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        values = {name: to_json(value) for name, value in self.values.items()}
        against = {
            other: {name: to_json(d) | {"verdict": verdict(name, d)} for name, d in found.items()}
            for other, found in self.against.items()
        }
        return {"name": self.name, "says": self.says, "run": self.run, "seed": self.seed} | {
            "values": values,
            "against": against,
        }


@dataclass(frozen=True, eq=False)
class GenerationsReport:
    """What `fastkd.generations` returns.

    generations: how many were asked for. complete: whether all students are trained. measure: the one that decides.
    members: the students that are trained, in their order. windows: of the held-out split. plot: path of the PNG, or
    None. kind: of the data; see `fastkd.utils.words`.
    """

    out: str
    generations: int
    complete: bool
    measure: str
    members: Sequence[Member] = ()
    windows: int = 0
    notes: Sequence[str] = ()
    plot: str | None = None
    kind: str = "text"

    @property
    def status(self) -> int:
        return DONE if self.complete else WORK_REMAINS

    def to_json(self) -> dict[str, Any]:
        own = {"format": "fastkd-generations", "version": 1, "status": self.status}
        names = ("out", "generations", "complete", "measure", "windows", "plot")
        own |= {name: getattr(self, name) for name in names} | {"notes": list(self.notes)}
        return own | {"members": [member.to_json() for member in self.members]}


def make_report(
    out: Path, count: int, measure: str, trained: Sequence[Trained], *, complete: bool = False,
    notes: Sequence[str] = (),
) -> GenerationsReport:  # fmt: skip
    """The report, from the evaluations of the trained students. measure: that decides; perplexity is judged by its
    logarithm. Raises TrainError if the evaluations lack it."""
    measure = "cross_entropy" if measure == "perplexity" else measure
    control = next((one for one in trained if one.name == CONTROL), None)
    members, before, windows = [], None, 0
    for one in trained:
        values: Mapping[str, Interval] = {}
        against: dict[str, Mapping[str, Interval]] = {}
        if one.evaluation is not None:
            values, windows = one.evaluation.intervals(), one.evaluation.windows
            if measure not in values:
                raise TrainError(f"best: got {measure!r}; expected one of {', '.join(values)}.")
            others = {} if one is control else {CONTROL: control, BEFORE: before}
            against = {
                name: compare(one.evaluation, other.evaluation)
                for name, other in others.items()
                if other is not None and other.evaluation is not None
            }
        members.append(Member(one.name, one.says, one.run, one.seed, values, against))
        before = before if one is control else one
    kind = next((one.evaluation.kind for one in trained if one.evaluation is not None), "text")
    return GenerationsReport(str(out), count, complete, measure, members, windows, notes, kind=kind)


def generations_text(report: GenerationsReport) -> str:
    """The students in a table, and which differ from the control and from the one before."""
    if not report.complete:
        return (
            f"{report.out}: stopped. Finished generations, committed shards and the checkpoint of a training that was "
            "stopped are kept. Run the same command again to resume."
        )
    names = distinct({name: value.mean for name, value in member.values.items()} for member in report.members)
    shown = [m for m in printed_in(LOG) if m.name in names]
    columns = {CONTROL: "against the control", BEFORE: "against the generation before"}
    columns = {other: head for other, head in columns.items() if any(other in m.against for m in report.members)}
    lines = [f"note: {note}" for note in report.notes]
    words = KINDS[report.kind]
    if shown:
        label = MEASURES[report.measure].label if report.measure in MEASURES else report.measure
        rows, unknown = [["student", *(m.short for m in shown), *columns.values()]], list[Interval]()
        for member in report.members:
            cells = [f"{member.values[m.name].mean:.4f}" if m.name in member.values else "" for m in shown]
            differences = [member.against.get(name, {}).get(report.measure) for name in columns]
            told = ["" if d is None else f"{difference_text(*d)}, {verdict(report.measure, d)}" for d in differences]
            unknown += [d for d in differences if d is not None and not d.known]
            rows.append([member.name, *cells, *told])
        lines += format_table(rows)
        lines.append(
            f"held-out split of the first cache, {counted(report.windows, words.window)}. Differences: {label}, "
            f"95% intervals paired by {words.window}; one seed"
        )
        lines += [f"not known: there is {NO_INTERVAL}"] * bool(unknown)
    else:
        lines.append(f"Nothing was evaluated on held-out {words.windows}, so the students are not compared.")
    plot = f", {report.plot}" if report.plot else ""
    return "\n".join([*lines, f"{report.out}/{GENERATIONS}{plot}; generation-N/run is the folder of a run"])


def read_json(path: Path) -> Any:
    """A JSON document, or None if there is no such file. TrainError if it is damaged."""
    try:
        return read_sealed(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise TrainError(f"{path}: cannot be read ({error}). Delete it, and run the same command again.") from error
