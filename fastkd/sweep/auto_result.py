"""The result of `fastkd sweep --auto`: which arms fell at which rung, what was chosen, and why."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

from ..settings import TrainSettings
from ..train.verdict import Verdict
from ..utils.intervals import Interval, to_json
from ..utils.numbers import difference_text, duration
from ..utils.signals import DONE, WORK_REMAINS
from ..utils.text import format_table
from .halving import Rung, cost_of
from .result import SWEEP

AUTO, CHOSEN = "auto.json", "chosen.json"


class Decision(NamedTuple):
    """Of a rung: its step, the names of the arms that go on, and all arms, the best first: name, value (None:
    diverged), and the difference to the best, paired over windows, with its interval of 95%."""

    step: int
    kept: Sequence[str]
    values: Sequence[tuple[str, float | None, Interval | None]]

    @property
    def fallen(self) -> Sequence[tuple[str, float | None, Interval | None]]:
        return [row for row in self.values if row[0] not in self.kept]


@dataclass(frozen=True)
class AutoReport:
    """What `auto_sweep` returns.

    complete: whether the choice is made. steps: of a full run. measure: by which arms are ranked, on the held-out
    split. default, hard: the arms with the settings as they are, and with hard labels alone. rungs: as planned.
    decisions: as far as they are made. changes: the settings of each arm. test: the chosen arm against the default,
    None if that is the chosen one. seconds: of the steps in this call. plot: path of the PNG, or None.
    """

    out: str
    complete: bool
    seed: int
    steps: int
    measure: str
    default: str
    hard: str
    rungs: Sequence[Rung]
    decisions: Sequence[Decision]
    notes: Sequence[str] = ()
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    test: Verdict | None = None
    seconds: float = 0.0
    plot: str | None = None

    @property
    def status(self) -> int:
        return DONE if self.complete else WORK_REMAINS

    @property
    def chosen(self) -> str | None:
        """The name of the chosen arm; None while work remains."""
        return self.decisions[-1].values[0][0] if self.complete else None

    @property
    def cost(self) -> tuple[float, float]:
        """In full runs: of the halving, and of training the default to its end."""
        reached = max((d.step for d in self.decisions if any(self.default == name for name, *_ in d.values)), default=0)
        return cost_of(self.rungs), 1.0 - reached / self.steps

    @property
    def why(self) -> str:
        """The choice, what it cost, and how sure it is, in a paragraph."""
        if not self.complete:
            return ""
        halving, rest = self.cost
        ends = ", ".join(str(rung.step) for rung in self.rungs[:-1])
        text = (
            f"Chosen by {self.measure} on the held-out split: {self.chosen}"
            f"{', the default settings' if self.chosen == self.default else ''}. {self.rungs[0].arms} arms were halved "
            f"after steps {ends} of {self.steps}, at the cost of {halving:.2f} full runs"
        )
        text += f", and {rest:.2f} more to complete the default settings." if rest else "."
        for arm, says in ((self.default, "The default settings"), (self.hard, "Hard labels alone")):
            if arm != self.chosen:
                text += f" {says} ({arm}) {self._fate(arm)}."
        if self.test is not None:
            text += (
                f" The chosen settings {self.test.sentence('against the default ones')}; the interval holds for all "
                "arms, as the best of several looks better than it is."
            )
        if self.chosen == self.hard:
            text += " So distillation did not help here: train on the labels alone."
        return text

    def _fate(self, arm: str) -> str:
        for decision in self.decisions:
            for name, value, behind in decision.fallen:
                if name == arm and value is None:
                    return f"diverged before step {decision.step}"
                if name == arm and behind is not None:
                    return f"fell at step {decision.step}, {_distance(behind)} behind the best"
        return "came to the end"

    def to_json(self) -> dict[str, Any]:
        """As JSON, without what differs between calls: a sweep that was interrupted writes the same."""
        rungs = [
            {
                "step": decision.step,
                "arms": [
                    {"name": name, "value": value, "kept": name in decision.kept, "behind": behind and to_json(behind)}
                    for name, value, behind in decision.values
                ],
            }
            for decision in self.decisions
        ]
        halving, rest = self.cost
        return {
            "format": "fastkd-sweep",
            "version": 1,
            "auto": True,
            "complete": self.complete,
            "seed": self.seed,
            "steps": self.steps,
            "measure": self.measure,
            "arms": {name: dict(changes) for name, changes in self.changes.items()},
            "rungs": rungs,
            "chosen": self.chosen,
            "default": self.default,
            "hard": self.hard,
            "cost": {"halving": halving, "default": rest, "full_runs": halving + rest},
            "test": self.test and self.test.to_json(),
            "verdict": self.why,
            "notes": list(self.notes),
        }


def _distance(behind: Interval) -> str:
    return difference_text(abs(behind.mean), behind.half, sign=False)


def auto_text(report: AutoReport) -> str:
    if not report.complete:
        return (
            f"{report.out}: stopped. Finished rungs are kept, and a checkpoint of the training that was stopped. Run "
            "the same command again to resume."
        )
    last = {name: d.step for d in report.decisions for name, *_ in d.values}
    rows = [["arm", *(f"step {d.step}" for d in report.decisions), "behind the best"]]
    for name in sorted(last, key=lambda name: (-last[name], [n for n, *_ in _of(report, last[name])].index(name))):
        cells, behind = [], ""
        for decision in report.decisions:
            found = next((row for row in decision.values if row[0] == name), None)
            cells.append("" if found is None else "diverged" if found[1] is None else f"{found[1]:.4f}")
            if found is not None and found[2] is not None:
                behind = _distance(found[2])
        rows.append([name, *cells, behind if name != report.chosen else "chosen"])
    lines = [f"note: {note}" for note in report.notes]
    lines += [f"held out, {report.measure} at each rung; last column: paired, where the arm fell", *format_table(rows)]
    lines.append(report.why)
    if report.seconds:
        lines.append(f"{duration(report.seconds)} of training in this call")
    plot = f", {report.plot}" if report.plot else ""
    return "\n".join([*lines, f"{report.out}/{CHOSEN} has the settings and a command; {report.out}/{SWEEP}{plot}"])


def _of(report: AutoReport, step: int) -> Sequence[tuple[str, float | None, Interval | None]]:
    return next(decision.values for decision in report.decisions if decision.step == step)


def chosen_document(
    report: AutoReport,
    settings: TrainSettings,
    student: str | None,
    caches: Sequence[str],
    data: str | None,
    weights: Sequence[float] = (1.0,),
) -> dict[str, Any]:
    """chosen.json: the settings as `fastkd.train` takes them, the command, and why. student, data: as a command line
    names them, if it can."""
    command = ["fastkd", "train", "--student", student or "STUDENT", "--cache", *caches]
    command += ["--cache-weights", *(f"{weight:g}" for weight in weights)] if len(caches) > 1 else []
    command += ["--out", "RUN"]
    command += ["--data", data] if data else []
    return {
        "chosen": report.chosen,
        "changes": dict(report.changes[report.chosen or ""]),
        "settings": asdict(settings),
        "command": [*command, *_flags(settings)],
        "why": report.why,
        "test": report.test and report.test.to_json(),
    }


def _flags(settings: TrainSettings) -> list[str]:
    """The flags of the settings that are not the defaults, and always those of the loss."""
    words: list[str] = []
    for f in fields(TrainSettings):
        value, flag = getattr(settings, f.name), "--" + f.name.replace("_", "-")
        if value == f.default and f.name not in ("alpha", "temperature", "divergence"):
            continue
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        elif isinstance(value, tuple):
            words += [flag, *map(str, value)]
        else:
            words += [flag, f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)]
    return words
