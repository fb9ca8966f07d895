"""`fastkd sweep --auto`: choose alpha, temperature and divergence by successive halving on the held-out split.

    SWEEP/  auto.json  sweep.json  chosen.json  auto.png  ARM/seed=S/ (a run of `fastkd.train`, as far as it came)

Each arm is a training with the full run's settings that pauses at the rungs of `halving.py`; one that falls loses its
checkpoints. Which arms go on depends on nothing but the evaluations that their folders keep, so a sweep that was killed
comes to the same choice. At last the settings as they were are trained to their end too, for the paired test.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from ..data.examples import Examples, as_examples
from ..errors import TrainError
from ..evaluate.measures import sign_of
from ..settings import TrainSettings
from ..settings_changes import TrainChanges, changed
from ..train import evaluations as kept
from ..train.api import DEFAULTS, train
from ..train.batch import with_batch
from ..train.cards import write_cards
from ..train.checkpoint import FOLDER
from ..train.inputs import CacheInputs, inputs_of
from ..train.outline import steps_of
from ..train.result import TrainReport, describe_cache
from ..train.settings_check import check_best, check_same, stated
from ..train.student import check_source, make_student
from ..train.trainer import Diverged, Pause
from ..train.verdict import judge
from ..utils.atomic import lock, remove_folder, write_json, writing
from ..utils.distributed import ALONE
from ..utils.intervals import TAIL, Interval
from ..utils.output_guard import check_folder
from ..utils.progress import Progress, naming, notes_only
from ..utils.signals import Stop
from ..utils.words import counted
from .api import check_alone
from .arms import Arm, auto_arms
from .auto_plot import plotted
from .auto_result import AUTO, CHOSEN, AutoReport, Decision, chosen_document
from .halving import Rung, going_on, plan_rungs, ranked
from .result import FAILED, SWEEP, read_document, read_result

Fallen = Mapping[str, float]


def auto_sweep(
    student: Any,
    cache: Any,
    out: str | Path,
    arms: Mapping[str, Any] | Sequence[Mapping[str, Any]] = (),
    settings: TrainSettings = DEFAULTS,
    *,
    data: Examples | None = None,
    data_name: str | None = None,
    stop: Stop | None = None,
    progress: str = "none",
    **changes: Unpack[TrainChanges],
) -> AutoReport:
    """Choose settings by successive halving, and say why. Called again with the same arguments, it resumes.

    student, cache, out, data, settings, changes, stop, progress: as for `sweep`. All arms have the settings' seed.
    arms: as for `sweep`; empty for those of `arms.AUTO`. The hard labels alone (alpha=1) and the settings as they are
        are always among them.
    data_name: how a command line names the data, for chosen.json.

    Returns the report; its `status` is 75 if work remains. Raises TrainError for settings that are not possible,
    without a held-out split, with fewer steps than the rungs need, and if all arms diverge; otherwise what `train`
    raises.
    """
    settings, out, stop = changed("auto_sweep", settings, changes), Path(out), stop or Stop()
    check_alone()
    data = as_examples(data)
    check_folder(out, "sweep")
    inputs = inputs_of(cache, data)
    if not isinstance(inputs, CacheInputs):
        raise TrainError("cache: got a batch source; expected a cache, or a mixture of caches.")
    if inputs.evaluator(settings) is None:
        raise TrainError(
            "auto: got no evaluations; expected those of the held-out split, by which arms are chosen. Capture with "
            "documents held out, and without evaluate_every=0."
        )
    begun = (read_document(out / AUTO) or {}).get("settings") or {}
    settings = with_batch(settings, inputs.size(settings), begun)
    chosen, default, hard, notes = auto_arms(arms, settings, inputs.spec)
    source = inputs.open(settings, ALONE)
    steps = steps_of(settings, len(source))
    source.close()
    groups = {arm.name: "hard" if arm == hard else arm.of(settings, settings.seed).temperature for arm in chosen}
    rungs = plan_rungs(len(chosen), steps, len(set(groups.values())))
    check_best(settings)
    check_source(student, settings)
    probe = make_student(student, inputs.spec, settings, data).student
    notes += [f"student: {note}" for note in probe.notes]
    caches = [(one["spec"], one["positions"]) for one in map(describe_cache, inputs.caches)]
    plan = {"settings": stated(asdict(settings)), "student": [probe.name, probe.parameters_and_bytes[0]]}
    plan |= {"caches": caches, "arms": [arm.name for arm in chosen], "rungs": [asdict(rung) for rung in rungs]}
    del probe
    with writing(out), ExitStack() as stack:
        out.mkdir(parents=True, exist_ok=True)
        stack.callback(os.close, lock(out))
        check_plan(out / AUTO, plan)
        say = notes_only(progress)
        for note in notes:
            say.event("note", text=note)
        given = {"data": data, "stop": stop, "progress": progress}
        halving = Halving(student, cache, out, settings, rungs, groups, inputs.weights, given, say)
        decisions = halving.run(chosen, default)
        report = AutoReport(
            str(out), False, settings.seed, steps, halving.measure, default.name, hard.name, rungs, decisions,
            notes=notes, changes={arm.name: dict(arm.changes) for arm in chosen},
        )  # fmt: skip
        if len(decisions) == len(rungs) and halving.reach(default, steps):
            best = next(arm for arm in chosen if arm.name == decisions[-1].values[0][0])
            report = replace(report, complete=True, **halving.test(best, default, len(chosen)))
            report = plotted(report)
            name = student if isinstance(student, str) else None
            places = [one.store.describe() for one in inputs.caches]
            own = best.of(settings, settings.seed)
            document = chosen_document(report, own, name, places, data_name, inputs.weights)
            write_json(out / CHOSEN, document)
        write_json(out / SWEEP, report.to_json() | {"settings": asdict(settings)})
        seconds = sum(one.seconds for one in halving.reports)
        return replace(report, seconds=seconds)


def check_plan(path: Path, plan: Mapping[str, Any]) -> None:
    """Write the plan of a sweep. Raises TrainError if there is another one."""
    if (there := read_document(path)) is not None:
        ours = json.loads(json.dumps(plan))
        check_same(there.pop("settings") | there, ours.pop("settings") | ours, str(path))
    write_json(path, dict(plan))


@dataclass
class Halving:
    """The trainings of a sweep by successive halving. groups: of each arm's name, see `going_on`. weights: of the
    caches. given: other arguments of `train`."""

    student: Any
    cache: Any
    out: Path
    settings: TrainSettings
    rungs: Sequence[Rung]
    groups: Mapping[str, Any]
    weights: Sequence[float]
    given: Mapping[str, Any]
    say: Progress

    def __post_init__(self) -> None:
        self.measure = "cross_entropy" if self.settings.best == "perplexity" else self.settings.best
        self.reports: list[TrainReport] = []

    def folder(self, arm: Arm) -> Path:
        return self.out / arm.name / f"seed={self.settings.seed}"

    def run(self, arms: Sequence[Arm], default: Arm) -> list[Decision]:
        """The decision at each rung, as far as they are made. Fallen arms lose their checkpoints, but the default."""
        decisions: list[Decision] = []
        for number, rung in enumerate(self.rungs):
            these = counted(len(arms), "arm")
            self.say.event("note", text=f"rung {number + 1} of {len(self.rungs)}: {these} to step {rung.step}")
            if not all(self.reach(arm, rung.step) for arm in arms):
                break
            most = self.rungs[min(number + 1, len(self.rungs) - 1)].arms
            decisions.append(decision := self._decide(arms, rung.step, most))
            for arm in arms:
                if arm.name not in decision.kept and arm != default:
                    _drop_checkpoints(self.folder(arm))
            arms = [arm for arm in arms if arm.name in decision.kept]
            self.say.event("note", text=f"after step {rung.step} these go on: {'; '.join(decision.kept)}")
        return decisions

    def reach(self, arm: Arm, step: int) -> bool:
        """Train an arm up to a step. Returns whether it is there, or has diverged."""
        folder, last = self.folder(arm), self.rungs[-1].step
        done = read_result(folder)
        there = step in kept.steps_of(folder)
        if done is not None and done.evaluations and not there:
            raise TrainError(f"{folder}: it was trained without rungs. Sweep with --auto into another folder.")
        if done is not None and (done.failed or done.evaluations):
            if not done.failed:
                write_cards(folder, text=self.given["data"] is None)  # it may have ended before its own
            return True
        if there and step < last:
            return True
        stop: Stop = self.given["stop"]
        if stop.asked:
            return False
        self.say.event("note", text=f"{arm.name}: to step {step}")
        pause = Pause(tuple(rung.step for rung in self.rungs), step)
        # checkpoints are those of the rungs: one is enough
        settings = replace(arm.of(self.settings, self.settings.seed), keep=1 if step < last else self.settings.keep)
        try:
            with naming(arm.name):
                self.reports.append(train(self.student, self.cache, folder, settings, pause=pause, **self.given))
        except Diverged as error:
            write_json(folder / FAILED, {"step": error.step, "error": str(error)})
            self.say.event("note", text=f"{arm.name}: diverged; continuing with the others. {error}")
            return True
        return step in kept.steps_of(folder)

    def _decide(self, arms: Sequence[Arm], step: int, most: int) -> Decision:
        """Rank the arms after a step by the measure, and compare each with the best, paired over windows."""
        found = {arm.name: kept.read(self.folder(arm), step) for arm in arms if not self._failed(arm)}
        if not found:
            raise TrainError(f"auto: all {len(arms)} arms diverged. The first: {self._failed(arms[0])}")
        values = {arm.name: math.nan for arm in arms}
        for name, each in found.items():
            measured = [one.intervals() for one in each]
            if self.measure not in measured[0]:
                known = ", ".join(measured[0])
                raise TrainError(f"best: got {self.settings.best!r}; with auto expected one of {known}.")
            shares = [weight / sum(self.weights) for weight in self.weights]
            values[name] = sum(s * one[self.measure].mean for s, one in zip(shares, measured, strict=True))
        order = ranked(values, sign_of(self.measure))
        rows: list[tuple[str, float | None, Interval | None]] = []
        for name in order:
            behind = None
            if name in found and name != order[0]:
                compared = judge("best", found[name], found[order[0]], self.weights, self.measure)
                behind = None if compared is None else compared.difference[self.measure]
            rows.append((name, values[name] if name in found else None, behind))
        return Decision(step, going_on([name for name in order if name in found], most, self.groups), rows)

    def test(self, best: Arm, default: Arm, arms: int) -> dict[str, Any]:
        """The chosen arm against the settings as they are. Since it is the best of several, the interval holds for all
        of them."""
        ours, theirs = (read_result(self.folder(arm)) for arm in (best, default))
        if best == default or ours is None or theirs is None or theirs.failed:
            return {}
        count = arms - 1
        given = ("default", ours.evaluations, theirs.evaluations, self.weights, self.measure)
        return {"test": judge(*given, looks=count, tail=TAIL / count)}

    def _failed(self, arm: Arm) -> str:
        done = read_result(self.folder(arm))
        return "" if done is None else done.failed


def _drop_checkpoints(folder: Path) -> None:
    remove_folder(folder / FOLDER)
    for left in folder.glob(f".{FOLDER}.*"):  # of a removal that was interrupted
        shutil.rmtree(left)
