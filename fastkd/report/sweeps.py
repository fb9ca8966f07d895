"""Sweeps, read for a report: the arms as `fastkd sweep` ranked them, each against hard labels alone, and their runs.

sweep.json        format "fastkd-sweep": arms, measure, seeds, verdict, settings; of --auto: arms, rungs, chosen
ARM/seed=S/       the run of an arm with a seed
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from ..errors import NoRun, ReportError, StreamError, TrainError
from ..evaluate.api import Evaluation
from ..sweep.auto_result import AUTO
from ..sweep.result import SWEEP, Result, read_result, seed_noise, window_noise
from ..train.result import RUN
from ..utils.intervals import Interval
from .runs import Json, Run, check_format, read_document, read_run

FORMAT, VERSION = "fastkd-sweep", 1
_SIGNS = {"alpha": "α", "temperature": "T"}  # of settings, in short names


class Step(NamedTuple):
    """An arm at a rung of a sweep with --auto: its value, and whether it went on."""

    step: int
    value: float | None
    kept: bool


@dataclass(frozen=True, eq=False)
class Arm:
    """An arm. name: of its folder. changes: its settings. values: of each measure, one per finished seed. behind:
    how far behind the best it is, with its interval; None for the best. folders: its runs. ended: why it has no result,
    or "". rungs: of a sweep with --auto, where it was."""

    name: str
    changes: Mapping[str, Any]
    folders: Sequence[Path]
    values: Mapping[str, Sequence[float]]
    behind: Interval | None = None
    ended: str = ""
    rungs: Sequence[Step] = ()

    @property
    def short(self) -> str:
        """Its name for an axis: "α 0.5, T 2, jsd"."""
        parts = []
        for key, value in self.changes.items():
            text = str(value) if isinstance(value, str) or float(f"{value:g}") != value else f"{value:g}"
            parts.append(text if isinstance(value, str) else f"{_SIGNS.get(key, key)} {text}")
        return ", ".join(parts) or self.name


@dataclass(frozen=True, eq=False)
class Sweep:
    """A sweep's folder. name: on the page. document: sweep.json. arms: ranked, the best first."""

    name: str
    folder: Path
    document: Json
    arms: Sequence[Arm]

    @property
    def auto(self) -> bool:
        """Whether it is one of --auto, whose arms fall at rungs."""
        return bool(self.document.get("auto"))

    @property
    def best(self) -> str | None:
        """The name of the best arm; None while work remains."""
        found = self.document.get("chosen" if self.auto else "best")
        return found if isinstance(found, str) else None

    @property
    def measure(self) -> str:
        """The one by which arms are ranked."""
        return str(self.document.get("measure"))

    @cached_property
    def runs(self) -> list[Run]:
        """All runs that there are, in the order of the arms."""
        return [run for arm in self.arms for run in self.runs_of[arm.name]]

    @cached_property
    def runs_of(self) -> Mapping[str, list[Run]]:
        """The runs of each arm."""
        return {
            arm.name: [read_run(at, f"{arm.name}, {at.name}") for at in arm.folders if (at / RUN).is_file()]
            for arm in self.arms
        }

    def control_of(self, arm: Arm) -> Arm | None:
        """The arm of hard labels alone with the same rate; None for that itself, and if there is none. Nor with --auto,
        whose arms end at different steps."""
        if self.auto:
            return None
        rate = self._setting(arm, "rate")
        hard = [one for one in self.arms if self.is_hard(one) and self._setting(one, "rate") == rate and one.values]
        return hard[0] if hard and not self.is_hard(arm) else None

    def against(self, arm: Arm, control: Arm) -> Interval | None:
        """The arm minus its control by the measure of the ranking, means over seeds; the half is the wider of the
        intervals over seeds and over windows (see `fastkd.sweep.result`), infinite if one of them is not known."""
        if not arm.values.get(self.measure) or not control.values.get(self.measure):
            return None
        whole = [one.values[self.measure] for one in self.arms if one.values.get(self.measure)]
        mean = fmean(arm.values[self.measure]) - fmean(control.values[self.measure])
        return Interval(mean, max(seed_noise(whole), self._windows(arm, control)))

    def _windows(self, arm: Arm, control: Arm) -> float:
        ours, theirs = self._evaluations(arm), self._evaluations(control)
        weights = self.document.get("weights") or [1.0]
        try:
            return window_noise(ours, theirs, weights, self.measure)
        except (StreamError, KeyError, ValueError):  # of other windows, or not kept
            return math.inf

    def _evaluations(self, arm: Arm) -> list[Sequence[Evaluation]]:
        try:
            found: list[Result | None] = [read_result(folder) for folder in arm.folders]
        except TrainError as error:
            raise ReportError(str(error)) from error
        return [one.evaluations for one in found if one is not None and one.evaluations]

    def _setting(self, arm: Arm, name: str) -> Any:
        return arm.changes.get(name, (self.document.get("settings") or {}).get(name))

    def is_hard(self, arm: Arm) -> bool:
        """Whether an arm is trained on hard labels alone."""
        return self._setting(arm, "alpha") == 1.0 and self._setting(arm, "alpha_end") in (None, 1.0)


def is_sweep(folder: Path) -> bool:
    """Whether a folder is that of a sweep, finished or not."""
    return any((folder / name).is_file() for name in (SWEEP, AUTO)) and not (folder / RUN).is_file()


def read_sweep(folder: Path, name: str) -> Sweep:
    """The sweep in a folder. Raises NoRun if it has not ended, ReportError if a file is damaged."""
    path = folder / SWEEP
    if not path.is_file():
        raise NoRun(f"{folder}: no {SWEEP} in it yet. Run the same sweep again: it goes on, and writes it at its end.")
    document = read_document(path)
    check_format(path, document, FORMAT, VERSION)
    try:
        arms = _auto_arms(folder, document) if document.get("auto") else _arms(folder, document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReportError(
            f"{path}: got no arms of a sweep ({type(error).__name__}: {error}). Run the same sweep again: it writes it."
        ) from error
    return Sweep(name, folder, document, arms)


def _arms(folder: Path, document: Json) -> list[Arm]:
    found = []
    for one in document["arms"]:
        stopped = [f"stopped after step {step} (seed {seed})" for seed, step in one.get("stopped", {}).items()]
        ended = ([f"diverged (seed {', '.join(one['diverged'])})"] if one["diverged"] else []) + stopped
        # the folder may have been moved since
        folders = [folder / one["name"] / f"seed={seed}" for seed in document["seeds"]]
        values = {} if ended else {name: [float(x) for x in some] for name, some in one["values"].items()}
        behind = None
        if (far := one["behind"]) is not None:
            halves = [math.inf if far[by] is None else far[by] for by in ("by_seeds", "by_windows")]
            behind = Interval(far["distance"], max(halves))
        found.append(Arm(one["name"], one["changes"], folders, values, behind, "; ".join(ended)))
    return found


def _auto_arms(folder: Path, document: Json) -> list[Arm]:
    """Of a sweep with --auto: those that came farthest first, and by their last value."""
    rungs: dict[str, list[Step]] = {name: [] for name in document["arms"]}
    ranks: dict[str, tuple[int, int]] = {}
    behind: dict[str, Interval | None] = {}
    for rung in document["rungs"]:
        for rank, one in enumerate(rung["arms"]):
            rungs[one["name"]].append(Step(int(rung["step"]), one["value"], bool(one["kept"])))
            ranks[one["name"]] = (-int(rung["step"]), rank)
            far = one["behind"]
            behind[one["name"]] = far and Interval(
                abs(far["mean"]), math.inf if far["high"] is None else far["high"] - far["mean"]
            )
    measure, seed = document["measure"], document["seed"]
    arms = []
    for name in sorted(rungs, key=lambda name: ranks.get(name, (0, 0))):
        last = rungs[name][-1] if rungs[name] else None
        ended = f"diverged before step {last.step}" if last is not None and last.value is None else ""
        values = {} if last is None or last.value is None else {measure: [last.value]}
        folders = [folder / name / f"seed={seed}"]
        arms.append(Arm(name, document["arms"][name], folders, values, behind.get(name), ended, rungs[name]))
    return arms
