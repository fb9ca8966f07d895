"""`fastkd.sweep`: several arms of a training from one read of the cache; called again, it goes on.

    SWEEP/  sweep.json  sweep.png  ARM/seed=0/ (a run of `fastkd.train`, and evaluation.json)  ARM/seed=1/ ...

A step's micro-batches are read and decoded once and given to every arm, one after the other. Each arm is a `Trainer`
of its own and comes to the bits that `fastkd.train` comes to alone. Arms of a seed share their first weights and their
order; another seed is another order, and so another read. Where memory is short, `at_once` cuts a seed's arms into
passes, a read each.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..cache.reader import Cache
from ..data.examples import Examples
from ..errors import TrainError
from ..evaluate.api import Evaluation
from ..settings import TrainSettings
from ..stream.batch import Step
from ..stream.cached import DistillLoader
from ..stream.dataset_check import check_data
from ..stream.open_caches import open_sources
from ..train.api import DEFAULTS, held_out, make_loader
from ..train.checkpoint import newest
from ..train.load_student import make_student
from ..train.settings_check import check_same, resume_fingerprint
from ..train.trainer import Diverged, Evaluate, Trainer, autocast_of, total_steps
from ..utils.atomic import lock, write_text
from ..utils.distributed import Processes, process_count, together
from ..utils.output_guard import check_sweep_place
from ..utils.progress import Progress
from ..utils.signals import Stop
from ..utils.text import size_text
from .arms import Arm, Memory, make_arms
from .plot import plotted
from .result import (
    EVALUATION,
    EVALUATIONS,
    FAILED,
    SWEEP,
    Result,
    SweepReport,
    make_report,
    read_result,
)

_MARK = "_fastkd_arm"


@dataclass(eq=False)
class Member:
    """A training among those that share a read. evaluations: the last ones, of each cache."""

    trainer: Trainer
    arm: Arm
    folder: Path
    settings: TrainSettings
    evaluate: Evaluate | None = None
    evaluations: list[Evaluation] = field(default_factory=list)


def sweep(
    student: Any,
    cache: Any,
    out: str | Path,
    arms: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    settings: TrainSettings = DEFAULTS,
    *,
    data: Examples | None = None,
    seeds: int = 2,
    at_once: int | None = None,
    stop: Stop | None = None,
    progress: str = "none",
    **changes: Any,
) -> SweepReport:
    """Train a student with several settings from one read of a cache a seed, and say which is the best, if one is.

    student, cache, data, settings, changes: as `train` takes them; settings are what all arms share.
    out: the sweep's folder. Called again with the same arguments, it goes on from each arm's last checkpoint; with more
        arms or seeds, what is finished stays.
    arms: {"alpha": [0, 0.5], "temperature": [1, 2]} for the grid of them, or a list of {setting: value}, an arm each;
        of alpha, temperature, divergence, treatment and rate. See `make_arms`.
    seeds: trainings an arm, from `settings.seed` on: what a difference is held against.
    at_once: arms in memory at once; None: all. Each further pass reads the cache again.
    stop: ask for a stop with `stop()`: every arm writes a checkpoint. progress: "none", "bar", "lines" or "events".

    An arm whose loss is not finite any more is left where it is, and the others go on.
    Returns what came out; `status` is 75 where work remains. Raises TrainError where the arms, the settings or the
    memory are not such, or all arms diverged; what `train` raises otherwise. One process: under torchrun it is refused.
    """
    if unknown := sorted(set(changes) - {f.name for f in fields(TrainSettings)}):
        raise TypeError(f"sweep() got unexpected settings: {', '.join(unknown)}")
    for name, number in (("seeds", seeds), ("at_once", at_once)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise TrainError(f"{name}: got {number!r}; expected an integer from 1 on.")
    settings, out = replace(settings, **changes), Path(out)
    if (count := process_count()) > 1:
        raise TrainError(
            f"sweep: got {count} processes; it runs in one. Give each its own arms and its own folder, without "
            "torchrun, or train the arms one by one with fastkd train."
        )
    check_sweep_place(out)
    caches, weights = open_sources(cache)
    check_data(caches, data)
    chosen, notes = make_arms(arms, settings, caches[0].spec)
    with together(settings.device) as processes, ExitStack() as stack:
        devices = [processes.device] if processes.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=devices))
        probe = make_student(student, caches[0].spec, settings, data).student
        memory = Memory.of(probe, processes.device)
        memory.check(len(chosen), at_once, probe, processes.device)
        out.mkdir(parents=True, exist_ok=True)
        stack.callback(os.close, lock(out))
        each_weight = [float(w) for w in weights]
        job = _Sweep(student, cache, caches, each_weight, data, processes, out, stop or Stop(), progress)
        job.identity = {"name": probe.name, "parameters": probe.parameters_and_bytes[0]}
        notes += [f"student: {note}" for note in probe.notes]
        del probe
        each = min(len(chosen), at_once or len(chosen))
        job.say(
            f"{len(chosen)} arms, {seeds} seeds, {each} arms at once in {size_text(memory.at_once(each))}: "
            f"{-(-len(chosen) // each) * seeds} reads of the cache"
        )
        for note in notes:
            job.say(note)
        numbers = range(settings.seed, settings.seed + seeds)
        for seed in numbers:
            for first in range(0, len(chosen), each):
                if not job.stop.asked:
                    job.one_pass(chosen[first : first + each], settings, seed)
        found = {(arm, seed): read_result(out / arm.name / f"seed={seed}") for arm in chosen for seed in numbers}
        report = make_report(out, chosen, list(numbers), found, job.weights, measure=settings.best, notes=notes)
        report = replace(
            report, at_once=each, bytes_at_once=memory.at_once(each), passes=job.passes, seconds=job.seconds,
            step_seconds=job.step_seconds, waiting=job.waited / job.seconds if job.seconds else 0.0,
        )  # fmt: skip
        report = plotted(report) if report.complete else report
        document = report.to_json() | {"settings": asdict(settings)}
        write_text(out / SWEEP, json.dumps(document, indent=1, allow_nan=False) + "\n")
        return report


class _Sweep:
    """What the passes share, and what they took: passes that read, seconds of their steps and of the arms' own."""

    def __init__(
        self, student: Any, cache: Any, caches: Sequence[Cache], weights: list[float],
        data: Examples | None, processes: Processes, out: Path, stop: Stop, progress: str,
    ) -> None:  # fmt: skip
        self._student, self._cache, self._caches, self.weights = student, cache, caches, weights
        self._data, self._processes, self._out, self.stop, self._mode = data, processes, out, stop, progress
        self.identity: dict[str, Any] = {}
        self.passes = 0
        self.seconds = self.step_seconds = self.waited = 0.0

    def say(self, text: str) -> None:
        """A line for a person, or an event."""
        mode = "lines" if self._mode == "bar" else self._mode
        Progress(0, unit="step", mode=mode).event("note", text=text)

    def one_pass(self, arms: Sequence[Arm], settings: TrainSettings, seed: int) -> None:
        """Arms of a seed to their ends, from one read; those that are finished stay as they are."""
        loader = make_loader(self._cache, replace(settings, seed=seed), self._processes, self._data)
        members: list[Member] = []
        with ExitStack() as stack:
            stack.callback(loader.close)
            for arm in arms:
                folder, own = self._out / arm.name / f"seed={seed}", arm.of(settings, seed)
                if not self._finished(folder, own, loader):
                    members.append(self._member(arm, folder, own, loader))
                    stack.callback(members[-1].trainer.close)
            if not members:
                return
            self.stop.gentle = True
            try:
                together = Together(members, loader, self.say)
                self.say(f"seed {seed}: {len(members)} arms from step {together.at} of {together.steps}")
                self.passes += 1
                shown = Progress(
                    together.steps * len(members),
                    unit="step",
                    already=sum(m.trainer.step for m in members),
                    shares=("waiting",),
                    mode=self._mode,
                )
                stack.callback(shown.close)
                together.run(self.stop, shown)
                self.seconds += together.seconds
                self.step_seconds += together.step_seconds
                self.waited += together.waited
                for member in together.members:
                    if member.trainer.step >= together.steps:
                        self._finish(member)
            finally:
                self.stop.gentle = False

    def _member(self, arm: Arm, folder: Path, settings: TrainSettings, loader: DistillLoader) -> Member:
        made = make_student(self._student, self._caches[0].spec, settings, self._data)
        if hasattr(made.student.model, _MARK) and not isinstance(self._student, nn.Module):
            delattr(made.student.model, _MARK)
            raise TrainError(
                "student: found the same module each time that one was asked for; the arms would share their weights. "
                "Return a new one each time, or give the module itself, which is copied."
            )
        setattr(made.student.model, _MARK, True)
        kept: list[Evaluation] = []

        def keep(found: list[Evaluation]) -> None:
            kept[:] = found

        evaluate = held_out(settings, self._caches, self.weights, keep, self._data)
        trainer = Trainer(made, loader, self._processes, settings, folder, evaluate=evaluate)
        return Member(trainer, arm, folder, settings, evaluate, kept)

    def _finished(self, folder: Path, settings: TrainSettings, loader: DistillLoader) -> bool:
        """Whether an arm is done, or diverged before. TrainError, StreamError where it is of another sweep."""
        done: Result | None = read_result(folder)
        if done is None:
            return False
        if done.failed:
            return True
        found = newest(folder)
        if found is None or done.identity != self.identity:
            raise TrainError(
                f"{folder}: it was trained with another student, or its checkpoints are gone. Sweep into another "
                "folder, or delete it to train it again."
            )
        autocast = autocast_of(settings.precision, self._processes.device)
        ours = resume_fingerprint(settings, total_steps(settings, loader), autocast)
        check_same(found.state["settings"], ours, str(folder))
        loader.load_state_dict(found.state["loader"])
        return bool(done.evaluations) or held_out(settings, self._caches, self.weights) is None

    def _finish(self, member: Member) -> None:
        """What an arm leaves: its student, what was measured, and last run.json, which says that it is done."""
        trainer = member.trainer
        trainer.measure_result(again=not member.evaluations)
        report = trainer.report()
        measured = [one.to_json() for one in member.evaluations]
        if len(measured) == 1:  # where a report looks for it
            write_text(member.folder / EVALUATION, json.dumps(measured[0], allow_nan=False) + "\n")
        elif measured:
            write_text(member.folder / EVALUATIONS, json.dumps(measured, allow_nan=False) + "\n")
        trainer.write_run(self._caches, report)


class Together:
    """Trainings that share a loader, each where its last checkpoint was: those that are ahead wait for the others.

    at, steps: made by the one that is furthest behind, and in all. seconds: of the steps made here, with the waiting
    for data (waited); step_seconds: what the trainings themselves took of them.
    """

    def __init__(
        self, members: Sequence[Member], loader: DistillLoader, say: Callable[[str], None] = lambda text: None
    ) -> None:
        self.members = list(members)
        self.seconds = self.step_seconds = self.waited = 0.0
        begin, places = loader.state_dict() | {"epoch": 0, "sequences": 0, "positions": 0, "steps": 0}, []
        for member in members:
            loader.load_state_dict(begin)
            member.trainer.resume()
            places.append((member.trainer.step, loader.state_dict()))
        self.at, place = min(places, key=lambda found: found[0])
        loader.load_state_dict(place)
        self.steps = members[0].trainer.steps
        self._minutes = members[0].settings.checkpoint_minutes
        self._say = say
        self._stream: Iterator[Step] = loader.steps()

    def step(self) -> list[Member]:
        """Give the next step to all that are at it. Returns them, but those that diverged."""
        clock = time.perf_counter
        begun = clock()
        step = next(self._stream)
        waited = clock() - begun
        took = [member for member in self.members if member.trainer.step == self.at]
        for member in took:
            began = clock()
            share = waited / len(took)
            # each has waited for its part of the time
            take = partial(member.trainer.take, step, begun=began - share, waited=share)
            self._unless_diverged(member, take)
            self.step_seconds += clock() - began
        self.at += 1
        self.waited += waited
        self.seconds += clock() - begun
        return [member for member in took if member in self.members]

    def run(self, stop: Stop, shown: Progress) -> None:
        """Make the steps that are left, up to a stop; checkpoints and evaluations where they are due."""
        saved = time.monotonic()
        while self.members and self.at < self.steps:
            waited = self.waited
            took = self.step()
            shown.add(len(took), waiting=self.waited - waited)
            stopped = stop.asked
            timed = time.monotonic() - saved >= 60 * self._minutes
            for member in took:
                self._unless_diverged(member, partial(member.trainer.turn, stopped=stopped, timed=timed))
            saved = time.monotonic() if timed else saved
            if stopped:
                break

    def _unless_diverged(self, member: Member, do: Callable[[], object]) -> None:
        try:
            do()
        except Diverged as error:
            self.members.remove(member)
            document = {"step": member.trainer.step, "error": str(error)}
            write_text(member.folder / FAILED, json.dumps(document) + "\n")
            self._say(f"{member.arm.name}: diverged, the others go on. {error}")
