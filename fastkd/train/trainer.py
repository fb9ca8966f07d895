"""Trainer: one student on its way through the steps of a loader, with its log and its checkpoints.

What a step does to the weights follows from the settings, the cache, the student and the number of the step alone:
batches come in the loader's order, and dropout draws by (seed, step, rank). So a run that was killed at any step comes
to the same weights as one that was not.
"""

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..cache.reader import Cache
from ..errors import TrainError, WorkRemains
from ..evaluate.measures import sign_of
from ..kernels import KDError
from ..settings import TrainSettings
from ..stream.batch import Step
from ..stream.cached import DistillLoader
from ..utils.atomic import lock, write_text
from ..utils.distributed import Processes
from ..utils.progress import Progress
from ..utils.signals import Stop
from .checkpoint import Checkpoint, clean, newest, prune, read, write
from .load_student import LoadedStudent
from .metrics import MetricsLog, StepDone, finite
from .optimizer import clip_, make_optimizer
from .parallel import Wrapped, checkpoint_layers, compile_layers
from .result import (
    RUN,
    STUDENT,
    TrainReport,
    command_line,
    run_document,
    write_student,
)
from .schedule import ramp_at, rate_at
from .settings_check import check_same, resume_fingerprint
from .state import MODEL, OPTIMIZER, load_model, load_optimizer, model_tensors, optimizer_tensors
from .student import Student
from .trackers import tracker_of

Evaluate = Callable[[Student], Mapping[str, float]]
"""Measures of a student, by name. Every process calls it, in the same order."""
_EVALUATIONS = 10  # of a run that does not say how many


class Diverged(TrainError):
    """A loss or a gradient is not finite. step: the optimizer step in which that happened."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Trainer:
    """One student, its optimizer, and how far they are."""

    def __init__(
        self,
        made: LoadedStudent,
        loader: DistillLoader,
        processes: Processes,
        settings: TrainSettings,
        out: Path,
        *,
        evaluate: Evaluate | None = None,
        progress: str = "none",
    ) -> None:
        self.student, self._tokenizer = made
        self._loader, self._processes, self._settings, self._out = loader, processes, settings, out
        self.steps = total_steps(settings, loader)
        self.step = self.resumed = 0
        device = processes.device
        self.student.to(device).train()
        self.student.autocast = autocast_of(settings.precision, device)
        if settings.activation_checkpointing:
            checkpoint_layers(self.student)
        if settings.compile:
            compile_layers(self.student)
        self.size = self.student.parameters_and_bytes
        self._wrapped = Wrapped(self.student, processes, parallel=settings.parallel)
        # of FSDP2, after the parameters became parts
        self.optimizer = make_optimizer(self.student, settings, device)
        self._deciding = resume_fingerprint(settings, self.steps, self.student.autocast)
        self._evaluate = evaluate
        self._evaluate_every = _every(settings.evaluate_every, self.steps) if evaluate else 0
        self._metrics: dict[str, Any] = {}
        self._evaluation: dict[str, float] = {}
        self._best: dict[str, Any] = {}
        self._checkpointed = 0
        self._undone: list[StepDone] = []
        self._positions, self._seconds, self._waited = 0, 0.0, 0.0
        self._mode = progress if processes.first else "none"
        self._log: MetricsLog | None = None
        self._lock: int | None = None
        self._progress: Progress | None = None

    def resume(self) -> None:
        """Go to the newest checkpoint, if there is one. TrainError where it is of another training."""
        if self._processes.first:
            self._out.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self._out)
            clean(self._out)
        found = newest(self._out, self._say) if self._processes.first else None
        step = self._processes.agree(found.step if found else 0)
        if step:
            whole = found or read(self._out, step, verify=False)
            if not isinstance(whole, Checkpoint):
                raise TrainError(f"{self._out}: process {self._processes.rank} finds no checkpoint of step {step} there"
                                 f" ({whole}); all processes need the same folder.")  # fmt: skip
            self._load(whole)
            self._say(f"going on from step {step} of {self.steps}")
        self.resumed = self._checkpointed = self.step
        if self._processes.first:
            tracker = tracker_of(self._settings.log, self._out, self.step, asdict(self._settings))
            self._log = MetricsLog(self._out, self.step, tracker)
        self._progress = Progress(self.steps, unit="step", already=self.step, shares=("waiting",), mode=self._mode)
        for note in self.student.notes:
            self._say(f"student: {note}")

    def run(self, stop: Stop) -> None:
        """Make the steps that are left, up to a stop."""
        clock = time.perf_counter
        flags = _no_flags
        saved = clock()
        begun, steps = clock(), self._loader.steps()
        while self.step < self.steps:
            step = next(steps)
            self.take(step, begun=begun, waited=clock() - begun)
            begun = clock()
            # one step late where there are several processes: none waits for another's answer
            answer = flags()
            due = clock() - saved >= 60 * self._settings.checkpoint_minutes
            flags = self._processes.begin_sum([int(stop.asked), int(due and self._processes.first)])
            stopped, timed = flags() if self._processes.world_size == 1 else answer
            if self.turn(stopped=bool(stopped), timed=bool(timed)):
                saved = begun = clock()
            if stopped:
                break
        flags()
        self.settle()
        steps.close()  # type: ignore[attr-defined]

    def take(self, step: Step, *, begun: float, waited: float) -> None:
        """Make an optimizer step. Its figures are read when the next one is under way (`settle`).

        begun: when it was asked for, by time.perf_counter; waited: seconds until it was there.
        """
        self._undone.append(done := self._make(step))
        self.settle(but=1)
        seconds = time.perf_counter() - begun
        done.known.update(
            positions=step.positions,
            sequences=step.sequences,
            positions_per_second=step.positions / seconds,
            seconds=seconds,
            waiting=waited / seconds,
        )
        self._positions += step.positions
        self._seconds += seconds
        self._waited += waited
        if self._progress is not None:
            self._progress.add(1, waiting=waited)

    def report(self) -> TrainReport:
        """What was done; where nothing is left to do, the result is written first."""
        complete = self.step >= self.steps
        if complete:
            self._export()
        return TrainReport(
            out=str(self._out),
            step=self.step,
            steps=self.steps,
            resumed=self.resumed,
            metrics=self._metrics,
            evaluation=self._evaluation,
            best=self._best,
            positions=self._positions,
            seconds=self._seconds,
            waiting=self._waited / self._seconds if self._seconds else 0.0,
            student=str(self._out / STUDENT) if complete else None,
            notes=self.student.notes,
        )

    def measure_result(self, *, again: bool) -> None:
        """At the end: have what was measured last be of the weights that are the result. again: though it seems so, as
        where that was measured by a process before this one."""
        best = self._best.get("step", self.step)
        other = self._settings.export == "best" and best != self.step
        if self._evaluate is None or not (other or again):
            return
        if other:
            found = self._checkpoint_to_export()
            load_model(found, self.student, self._processes)
        self._evaluation = self._measured()

    def write_run(self, caches: Sequence[Cache], report: TrainReport) -> None:
        """run.json: all that a report on the run needs."""
        document = run_document(self.student, self.size, caches, self._processes.device, self._processes.world_size) | {
            "settings": asdict(self._settings),
            "command": command_line(),
            "report": report.to_json(),
        }
        write_text(self._out / RUN, json.dumps(document, indent=1, allow_nan=False) + "\n")

    def close(self) -> None:
        """End what runs beside, and close files."""
        self._loader.close()
        if self._log is not None:
            self._log.close()
        if self._lock is not None:
            os.close(self._lock)
        if self._progress is not None:
            self._progress.close()

    def _make(self, step: Step) -> StepDone:
        """One optimizer step."""
        settings, device = self._settings, self._processes.device
        torch.manual_seed(_seed_of(settings.seed, self.step, self._processes.rank))
        at = self._schedule()
        scalars = {name: torch.full((), at[name], device=device) for name in ("alpha", "temperature")}
        figures = torch.zeros(4, device=device)
        try:
            for number, batch in enumerate(step.micro_batches, 1):
                out = self._wrapped.forward_backward(
                    batch,
                    last=number == len(step.micro_batches),
                    num_items=step.count,
                    divergence=settings.divergence,
                    treatment=settings.treatment,
                    beta=settings.beta,
                    skew=settings.skew,
                    **scalars,
                )
                figures[:3] += torch.stack(out)
        except KDError as error:
            self.settle()
            # on the CPU the loss itself refuses logits that are not finite
            raise self._stopped_by(str(error), self.step + 1, _name(step)) from error
        self._processes.sum_(figures)
        figures[3] = clip_(self.student.parameters(), settings.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = at["rate"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return StepDone(self.step, figures, {"epoch": step.epoch, **at}, _name(step))

    def _schedule(self) -> dict[str, float]:
        settings, at = self._settings, (self.step, self.steps)
        return {
            "rate": rate_at(*at, peak=settings.rate, schedule=settings.rate_schedule, warmup=settings.warmup,
                            floor=settings.rate_floor, decay=settings.decay),
            "alpha": ramp_at(*at, start=settings.alpha, end=settings.alpha_end, schedule=settings.alpha_schedule),
            "temperature": ramp_at(*at, start=settings.temperature, end=settings.temperature_end,
                                   schedule=settings.temperature_schedule),
        }  # fmt: skip

    def settle(self, *, but: int = 0) -> None:
        """Read the figures of steps, but of the last so many, and log them. TrainError where they are not finite."""
        while len(self._undone) > but:
            done = self._undone.pop(0)
            record = done.record()
            if name := finite(record):
                raise self._stopped_by(f"{name} is {record[name]}", done.step, done.batch)
            self._metrics = record
            if self._log is not None:
                self._log.write(record)
            if self._progress is not None:
                for name in ("loss", "hard", "soft"):
                    self._progress.figure(name, record[name], f"{name} {record[name]:.3f}")
                speed = record["positions_per_second"]
                self._progress.figure("positions_per_second", speed, f"{speed:,.0f} positions/s")

    def turn(self, *, stopped: bool, timed: bool) -> bool:
        """After a step: evaluate and write a checkpoint, where either is due. Whether anything was.

        stopped, timed: a checkpoint is due because a stop was asked for, or by the clock: the same on all processes.
        """
        last = self.step == self.steps
        every = self._evaluate_every
        evaluate = bool(every) and (last or self.step % every == 0)
        every = self._settings.checkpoint_every or 0
        save = stopped or timed or last or (bool(every) and self.step % every == 0)
        if not (evaluate or save):
            return False
        self.settle()
        better = evaluate and self._measure()
        if save or better:
            self._save()
        return True

    def _measure(self) -> bool:
        """Evaluate; whether the student is the best so far."""
        found = self._measured()
        name, before = self._settings.best, self._best.get("value")
        if name not in found:
            raise TrainError(f"best: got {name!r}; the evaluation has {', '.join(found)}.")
        sign = sign_of(name)
        better = before is None or sign * found[name] < sign * before
        # each process has measured; where they differ in the last digit, one has to decide
        better = bool(self._processes.agree(int(better)))
        if better:
            self._best = {"step": self.step, "measure": name, "value": found[name]}
        self._evaluation = found
        if self._log is not None:
            self._log.write({"step": self.step, "evaluation": found})
        measures = ", ".join(f"{key} {value:.4f}" for key, value in found.items())
        self._say(f"step {self.step} of {self.steps}: {measures}")
        return better

    def _measured(self) -> dict[str, float]:
        assert self._evaluate is not None
        self.student.eval()
        found = dict(self._evaluate(self.student))
        self._wrapped.evaluated()
        self.student.train()
        return found

    def _save(self) -> None:
        """Write a checkpoint; all figures up to here are finite."""
        tensors = {
            MODEL: model_tensors(self.student),
            OPTIMIZER: optimizer_tensors(self.optimizer, self.student),
        }
        state = {
            "settings": self._deciding,
            "loader": self._loader.state_dict(),
            "best": self._best,
            "metrics": self._metrics,
            "evaluation": self._evaluation,
            "processes": self._processes.world_size,
        }
        try:
            write(self._out, self.step, tensors, state, self._processes)
        except OSError as error:
            raise WorkRemains(
                f"{self._out}: the checkpoint of step {self.step} cannot be written ({error}). Earlier checkpoints are "
                "kept: free disk space, and the same command resumes."
            ) from error
        if self._processes.first:
            prune(self._out, keep=self._settings.keep, best=self._best.get("step"), last=self.step)
        self._checkpointed = self.step

    def _load(self, found: Checkpoint) -> None:
        check_same(found.state["settings"], self._deciding, str(found.folder))
        load_model(found, self.student, self._processes)
        load_optimizer(found, self.optimizer, self.student, self._processes)
        self._loader.load_state_dict(found.state["loader"])
        self.step = found.step
        self._best, self._metrics, self._evaluation = (found.state[n] for n in ("best", "metrics", "evaluation"))

    def _export(self) -> None:
        """Write the student."""
        if self._processes.first:
            tensors = self._checkpoint_to_export().tensors(MODEL)
            write_student(self._out / STUDENT, self.student, tensors, self._tokenizer)

    def _checkpoint_to_export(self) -> Checkpoint:
        step = self._best.get("step", self.step) if self._settings.export == "best" else self.step
        found = read(self._out, step)
        if not isinstance(found, Checkpoint):
            raise TrainError(
                f"{self._out}: the {self._settings.export} checkpoint, of step {step}: {found}. Delete it, and train "
                "again; or choose the other one (export)."
            )
        return found

    def _stopped_by(self, what: str, step: int, batch: str) -> Diverged:
        kept = (
            f"The checkpoint of step {self._checkpointed} is kept" if self._checkpointed else "No checkpoint was made"
        )
        return Diverged(
            f"step {step}: {what} (batch: {batch}). {kept} in {self._out}, and nothing after it. Where the student has "
            "diverged: lower the rate, warm up for longer or clip gradients lower, and train into another folder.",
            step,
        )

    def _say(self, text: str) -> None:
        if self._progress is not None:
            self._progress.event("note", text=text)
        elif self._mode in ("bar", "lines"):
            print(text, file=sys.stderr, flush=True)


def _no_flags() -> list[int]:
    return [0, 0]


def _every(every: int | None, steps: int) -> int:
    return max(1, steps // _EVALUATIONS) if every is None else every


def total_steps(settings: TrainSettings, loader: DistillLoader) -> int:
    """Optimizer steps of a training."""
    return settings.steps or max(1, math.ceil(settings.epochs * len(loader)))


def autocast_of(precision: str, device: torch.device) -> torch.dtype | None:
    """The type of matrix products that a precision comes to on a device; None: that of the weights."""
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return torch.bfloat16 if precision == "bfloat16" else None


def _seed_of(seed: int, step: int, rank: int) -> int:
    """What a step's dropout is drawn by. No generator's state has to be kept, and evaluations do not shift it."""
    return int.from_bytes(hashlib.sha256(f"{seed},{step},{rank}".encode()).digest()[:7])


def _name(step: Step) -> str:
    return f"epoch {step.epoch}, step {step.number} of it, {step.sequences} sequences, {step.positions} positions"
