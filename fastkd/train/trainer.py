"""Trainer: trains one student on the steps of a batch source, with a log and checkpoints.

A step's effect on the weights depends only on the settings, the source, the student, the objective and the number of
the step: batches come in the source's order, and dropout draws by (seed, step, rank). So a run that was killed at any
step comes to the same weights as one that was not.
"""

import errno
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..errors import TrainError, WorkRemains
from ..evaluate.forward import NotFinite
from ..evaluate.measures import distinct, sign_of
from ..kernels import KDError
from ..settings import TrainSettings
from ..stream.batch import BatchSource, Step
from ..utils.atomic import lock, write_json, writing
from ..utils.distributed import Processes
from ..utils.numbers import measure_text
from ..utils.progress import Mode, Progress, notes_only
from ..utils.signals import Stop, Stopped
from ..utils.similar import did_you_mean
from ..utils.words import TEXT, Words
from .auto_weight import AutoWeights
from .beside import check_exports, folders_beside, write_beside
from .checkpoint import (
    MODEL,
    OPTIMIZER,
    Checkpoint,
    clean,
    drop_optimizer,
    load_model,
    load_optimizer,
    model_tensors,
    newest,
    optimizer_tensors,
    prune,
    read,
    write,
)
from .checkpoint import steps_of as checkpoint_steps
from .evaluations import drop_after as drop_evaluations_after
from .evaluations import kept_steps
from .evaluations import read as read_evaluations
from .evaluations import write as write_evaluations
from .fake_quantisation import fake_quantisation
from .lora import base_sha256, check_sharded, whole_tensors
from .metrics import MetricsLog, StepMetrics, tracker_of
from .objective import Objective, TokenKD, WeightedSum, check_objective
from .objectives.hidden import HiddenKD
from .optimizer import clip_all_, make_optimizer, rate_at, set_rate
from .outline import Outline, evaluate_every_of, steps_of
from .parallel import ParallelStudent, checkpoint_layers, compile_layers
from .precision import autocast_of
from .result import RUN, STUDENT, STUDENTS, TrainReport, command_line, run_document, write_student
from .settings_check import check_same, resume_fingerprint
from .student import LoadedStudent, Student
from .verdict import Verdict
from .watch import PeersWatch, Watch

if TYPE_CHECKING:
    from ..evaluate.result import Evaluation

Evaluate = Callable[[Student], Mapping[str, float]]
"""Returns measures of a student by name. All processes call it, in the same order."""
_BEYOND = {"objective": "objective", "live": "inner_teacher"}  # names in a fingerprint, and in run.json
KEEP = 2  # checkpoints while it trains, if the settings do not say


class Pause(NamedTuple):
    """Where a training pauses, to be resumed later: it evaluates after the steps `at`, and at the end, instead of
    every `evaluate_every` steps; and it stops after the step `until`, with a checkpoint. The steps are those of the
    whole training: its schedules do not know of the pause."""

    at: tuple[int, ...]
    until: int


class Diverged(TrainError):
    """A loss or a gradient is not finite. step: the optimizer step in which that happened."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Trainer:
    """One student, its optimizer, and the number of steps made.

    made: from `make_student`. source: any `BatchSource`; it is closed with the trainer. out: the run's folder.
    objective: None for the `TokenKD` of the settings. evaluate: None for no evaluations. watch: ends the training when
    the student is worse than another. pause: evaluates after other steps, and pauses after one.
    """

    def __init__(
        self,
        made: LoadedStudent,
        source: BatchSource,
        processes: Processes,
        settings: TrainSettings,
        out: Path,
        *,
        objective: Objective | None = None,
        evaluate: Evaluate | None = None,
        watch: Watch | PeersWatch | None = None,
        pause: Pause | None = None,
        progress: Mode = "none",
    ) -> None:
        self.student, self._tokenizer = made
        self._source, self._processes, self.settings, self._out = source, processes, settings, out
        self.steps = steps_of(settings, len(source))
        self.step = self.resumed = 0
        self._objective = TokenKD.from_settings(settings) if objective is None else objective
        check_objective(self._objective)
        self.student.fake = fake_quantisation(self.student.model, self.student.name, settings, self.steps)
        self.student.notes += [] if self.student.fake is None else self.student.fake.notes
        self._fake_quantise()
        self.student.read(self._objective)
        check_exports(settings, self.student)
        check_sharded(settings, self.student.model, self.student.name, processes.world_size)
        self._auto: AutoWeights | None = None
        if isinstance(self._objective, WeightedSum) and self._objective.auto:
            self._auto = AutoWeights(self._objective)
        self._left_out = self.student.left_out
        self._base = base_sha256(self.student, self._left_out) if self._left_out else None
        device = processes.device
        self.student.to(device).train()
        self.student.autocast = autocast_of(settings.precision, device)
        if settings.activation_checkpointing:
            checkpoint_layers(self.student)
        if settings.compile:
            compile_layers(self.student)
        self.size = self.student.parameters_and_bytes
        kind = type(self.student.live).__qualname__  # which FSDP2 changes
        sharing = replace(processes, rank=0, world_size=1, group=None) if self.student.alone else processes
        self._parallel = ParallelStudent(self.student, sharing, parallel=settings.parallel)
        # after FSDP2 has replaced the parameters by its shards
        self.optimizer = make_optimizer(self.student, settings, device)
        self._fingerprint = resume_fingerprint(settings, self.steps, self.student.autocast)
        if objective is not None:
            described = json.loads(json.dumps(dict(objective.describe())))  # as a checkpoint returns it
            self._fingerprint["objective"] = {"type": type(objective).__qualname__, **described}
        if (live := self.student.live) is not None:
            described = json.loads(json.dumps(dict(live.describe())))
            self._fingerprint["live"] = {"type": kind, **described}
        if (bind := getattr(source, "bind", None)) is not None:  # a source that asks the student, as for rollouts
            bind(self.student)
        self._words: Words = getattr(source, "words", TEXT)
        self._evaluate = evaluate
        self._evaluate_every = 0 if evaluate is None else evaluate_every_of(settings, self.steps)
        self._kept_steps = kept_steps(self.steps, self._evaluate_every) if pause is None else pause.at
        self._pause, self._watch = pause, watch
        self._looks = [] if watch is None else watch.looks(self.steps, self._evaluate_every)
        self.worse: Verdict | None = None
        self._metrics: dict[str, Any] = {}
        self._evaluation: dict[str, float] = {}
        self._best: dict[str, Any] = {}
        self._checkpointed = 0
        self._due = False  # whether the evaluation of the last step made was stopped
        self._unlogged: list[StepMetrics] = []
        self._positions, self._seconds, self._waited = 0, 0.0, 0.0
        self._mode = progress if processes.first else "none"
        # replaced when the work begins
        self._progress = notes_only(self._mode)
        self._log: MetricsLog | None = None
        self._lock: int | None = None

    def resume(self) -> None:
        """Load the newest checkpoint, if there is one, and open the log. Raises TrainError if it is not of this run."""
        if self._processes.first:
            self._out.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self._out)
            clean(self._out)
        found = newest(self._out, self._say) if self._processes.first else None
        step, mark = self._processes.agree(found.step if found else 0), None
        if step:
            checkpoint = found or read(self._out, step, verify=False)
            if not isinstance(checkpoint, Checkpoint):
                raise TrainError(f"{self._out}: process {self._processes.rank} has no checkpoint of step {step} there "
                                 f"({checkpoint}); all processes need the same folder.")  # fmt: skip
            self._load(checkpoint)
            mark = checkpoint.state.get("log")
            self._say(f"resuming from step {step} of {self.steps}")
        self.resumed = self._checkpointed = self.step
        self._fake_quantise()
        if self._processes.first:
            tracker = tracker_of(self.settings.log, self._out, self.step, asdict(self.settings))
            self._log = MetricsLog(self._out, self.step, tracker, mark, evaluated=not self._due)
            if self._log.changed:
                self._say(f"{self._out}: metrics.jsonl has changed since step {step}; what cannot be read is left out")
        self._progress = Progress(self.steps, unit="step", already=self.step, shares=("waiting",), mode=self._mode)
        for note in self.student.notes:
            self._say(f"student: {note}")
        if self._processes.first:
            drop_evaluations_after(self._out, self.step - self._due)
        if not self._due:
            self._look(lambda: read_evaluations(self._out, self.step))

    def tell(self, outline: Outline) -> None:
        """Say what the training will do, unless it is done."""
        if not self.complete:
            first, *more = outline.lines
            self._progress.event("training", text=first, **outline.to_json())
            for line in more:
                self._say(line)

    def run(self, stop: Stop) -> None:
        """Make the remaining steps, until a stop is requested."""
        clock = time.perf_counter
        flags: Callable[[], list[int]] = lambda: [0, 0]  # noqa: E731  whether to stop, and to save
        end = self.steps if self._pause is None else min(self.steps, self._pause.until)
        if self._due:  # in any case, so that each call goes on
            self._due = False
            self._evaluate_and_save_if_due(stopped=False, timed=True)
        self._heed(stop)
        begun = saved = clock()
        steps = iter(self._source.steps())
        while self.step < end and self.worse is None and not self._due:
            try:
                step = next(steps, None)
            except (WorkRemains, Stopped) as reason:  # the source waits, for others or its teacher: training is kept
                if self.step > self._checkpointed:
                    self._flush_metrics()
                    self._save()
                if isinstance(reason, Stopped):
                    break
                raise
            if not isinstance(step, Step):
                raise TrainError(
                    f"source: got {'no step' if step is None else type(step).__name__} from "
                    f"{type(self._source).__name__}.steps() after step {self.step} of {self.steps}; expected a "
                    "fastkd.stream.Step, epoch after epoch without end."
                )
            self._take(step, begun=begun, waited=clock() - begun)
            begun = clock()
            # of several processes, one step late: none waits for the others' answer
            answer = flags()
            due = clock() - saved >= 60 * self.settings.checkpoint_minutes
            flags = self._processes.begin_sum([int(stop.asked), int(due and self._processes.first)])
            stopped, timed = flags() if self._processes.world_size == 1 else answer
            if self._evaluate_and_save_if_due(stopped=bool(stopped), timed=bool(timed)):
                saved = begun = clock()
            if stopped:
                break
        flags()
        self._flush_metrics()
        self._source.close()
        self.student.interrupted = None

    def _heed(self, stop: Stop) -> None:
        """From now on a stop request ends an evaluation, by `Stopped`, unless other processes are in it."""
        self.student.interrupted = lambda: stop.asked and self._processes.world_size == 1

    def report(self) -> TrainReport:
        """What was done. Once all steps are made, it first writes the trained student."""
        folder = self._out / (STUDENTS if self.student.parts else STUDENT)
        beside = folders_beside(self._out, self.settings)
        merge = self.complete and self.settings.lora_merge
        frozen = whole_tensors(self.student, self._left_out, kept=self._processes.first) if merge else {}
        with self._processes.all_or_none():
            if self.complete and (self._processes.first or self.student.alone):
                self._export(folder, frozen)
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
            student=str(folder) if self.complete else None,
            exported={name: str(path) for name, path in beside.items()} if self.complete else {},
            notes=self.student.notes,
            stopped_worse=self.worse,
            kind=self._words.kind,
            unfinished="The evaluation after the last one was stopped" if self._due and self.step >= self.steps else "",
        )

    @property
    def complete(self) -> bool:
        """Whether all steps are made and evaluated, or the student was stopped since it is worse than another."""
        return (self.step >= self.steps and not self._due) or self.worse is not None

    @property
    def _finished_without_optimizer(self) -> bool:
        """Whether checkpoints need no optimizer's state: after the last step, unless it is asked for by `keep`. With
        more steps the schedule of the learning rate would be another one from the first step on."""
        return self.step >= self.steps and self.settings.keep is None

    def evaluate_result(self, stop: Stop, *, again: bool) -> None:
        """After the last step: evaluate the weights that are exported, unless the last evaluation was of them. After a
        stop request the same call makes it later.

        again: evaluate them in any case, for example since an earlier process made that evaluation.
        """
        best = self._best.get("step", self.step)
        other = self.settings.export == "best" and best != self.step
        if self._evaluate is None or not (other or again):
            return
        if other:
            load_model(self._exported_checkpoint(), self.student, self._processes)
        self._heed(stop)
        try:
            self._evaluation = self._measures()
        except Stopped:
            self._due = True
        self.student.interrupted = None

    def tidy_checkpoints(self) -> None:
        """Once the run is finished, without `keep`: leave the weights of the last and the best checkpoint alone."""
        if not (self._finished_without_optimizer and self._processes.first):
            return
        with writing(self._out, "a checkpoint"):
            prune(self._out, keep=1, best=self._best.get("step"), last=self.step)
            for step in checkpoint_steps(self._out):
                drop_optimizer(self._out, step)

    def write_run(self, report: TrainReport, inputs: Mapping[str, Any] | None = None) -> None:
        """Write run.json. inputs: a description of the data; default: the source's fingerprint."""
        described = {"caches": [], "source": dict(self._source.fingerprint)} if inputs is None else inputs
        document = run_document(self.student, self.size, described, self._processes.device, self._processes.world_size)
        if isinstance(self._objective, WeightedSum):
            document["weights"] = self._objective.weights
        if self._base is not None:
            document["student"]["base_sha256"] = self._base
        # beyond the settings: what else decides the training
        document |= {n: self._fingerprint[k] for k, n in _BEYOND.items() if k in self._fingerprint}
        document |= {"settings": asdict(self.settings), "command": command_line(), "report": report.to_json()}
        write_json(self._out / RUN, document)

    def close(self) -> None:
        self._source.close()
        if self._log is not None:
            self._log.close()
        if self._lock is not None:
            os.close(self._lock)
        self._progress.close()

    def _take(self, step: Step, *, begun: float, waited: float) -> None:
        """Make an optimizer step, and log the one before, whose metrics are on the host by now.

        begun: time.perf_counter() when the batch was requested; waited: seconds until it was there.
        """
        self._unlogged.append(done := self._make(step))
        self._flush_metrics(keep=1)
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
        if self.step == self.steps:
            self._flush_metrics()  # the last line of progress has the losses of the last step
        self._progress.add(1, waiting=waited)

    def _make(self, step: Step) -> StepMetrics:
        settings, device, at = self.settings, self._processes.device, (self.step, self.steps)
        rate = rate_at(
            *at, peak=settings.rate, schedule=settings.rate_schedule, warmup=settings.warmup, floor=settings.rate_floor,
            decay=settings.decay,
        )  # fmt: skip
        scheduled = self._objective.schedule(*at)
        scalars = {name: torch.full((), value, device=device) for name, value in scheduled.items()}
        if self.step == 0:
            self._fit_projectors(step, scalars)
        if self._auto is not None and self._auto.pending:
            self._auto.measure(lambda: self._gradient_norm(step, scalars))
        sums = self._losses(step, scalars)
        values = self._processes.sum_(torch.stack([value.float() for value in sums.values()]))
        norms = self.student.clip_(settings.clip)
        set_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._fake_quantise()
        if self.student.live is not None:
            self.student.live.after_step(self.student, self.step)
        values = torch.cat([values, torch.stack([norm.float() for norm in norms.values()])])
        known = {"epoch": step.epoch, "rate": rate, **scheduled, **step.metrics}
        if self._auto is not None:
            known |= {f"weight/{name}": self._auto.weights[name] for name in self._auto.weights}
        return StepMetrics(self.step, tuple(sums), tuple(norms), values, known, _describe(step))

    def _fake_quantise(self) -> None:
        """Before the next step: whether it is made with quantised weights."""
        if self.student.fake is not None:
            self.student.fake.enable(self.step >= self.student.fake.after)

    def _fit_projectors(self, step: Step, scalars: Mapping[str, torch.Tensor]) -> None:
        """Before the first step: fit the projectors that want it to the step's batch."""
        terms = [term for term in self.student.modules() if isinstance(term, HiddenKD) and term.fit]
        if not terms:
            return
        for term in terms:
            term.begin_fit(self._processes.device)
        self.student.eval()
        for batch in step.micro_batches:
            self._parallel.forward(batch, num_items=step.count, **scalars)
        self._parallel.reshard()
        self.student.train()
        for term in terms:
            term.end_fit(self._processes)

    def _seed_dropout(self) -> None:
        """By seed, step and rank: so no generator's state has to be saved, and evaluations do not change it."""
        seed = hashlib.sha256(f"{self.settings.seed},{self.step},{self._processes.rank}".encode()).digest()
        torch.manual_seed(int.from_bytes(seed[:7]))

    def _losses(self, step: Step, scalars: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Forward and backward of all micro-batches: this process's sums of their losses, by name."""
        self._seed_dropout()
        sums: dict[str, torch.Tensor] = {}
        try:
            for number, batch in enumerate(step.micro_batches, 1):
                last = number == len(step.micro_batches)
                if len(step.micro_batches) > 1:
                    self._progress.doing(f"micro-batch {number}/{len(step.micro_batches)}")
                losses = self._parallel.forward_backward(batch, last=last, num_items=step.count, **scalars)
                if sums and tuple(losses) != tuple(sums):
                    raise TrainError(
                        f"objective: got the parts {', '.join(losses)} of micro-batch {number}, and {', '.join(sums)} "
                        "before; expected the same names in the same order."
                    )
                sums = {name: value + sums[name] if sums else value for name, value in losses.items()}
        except KDError as error:
            self._flush_metrics()
            # on the CPU the loss itself raises for logits that are not finite
            raise self._diverged(str(error), self.step + 1, _describe(step)) from error
        return sums

    def _gradient_norm(self, step: Step, scalars: Mapping[str, torch.Tensor]) -> float:
        """The norm of the objective's gradient in the student's parameters for a step, which is not made."""
        self._losses(step, scalars)
        norm = float(clip_all_(self.student, None))
        self.optimizer.zero_grad(set_to_none=True)
        if not math.isfinite(norm):
            raise self._diverged(f"the norm of a gradient is {norm}", self.step + 1, _describe(step))
        # a sum over processes may end in other digits on each: the first one decides
        return float(self._processes.gather(norm)[0])

    def _flush_metrics(self, *, keep: int = 0) -> None:
        """Log the metrics of all steps except the last `keep`. Raises Diverged if one is not finite."""
        while len(self._unlogged) > keep:
            done = self._unlogged.pop(0)
            record = done.record()
            for name in (*done.parts, *done.norms):
                if not math.isfinite(record[name]):
                    raise self._diverged(f"{name} is {record[name]}", done.step, done.batch)
            self._metrics = record
            if self._log is not None:
                self._log.write(record)
            for name in done.parts:
                self._progress.figure(name, record[name], f"{name} {record[name]:.3f}")
            speed = record["positions_per_second"]
            self._progress.figure("positions_per_second", speed, f"{speed:,.0f} {self._words.positions}/s")

    def _evaluate_and_save_if_due(self, *, stopped: bool, timed: bool) -> bool:
        """After a step: evaluate, and write a checkpoint, if they are due. Returns whether anything was.

        stopped, timed: a checkpoint is due because of a stop, or by the clock; the same on all processes.
        """
        last, pause = self.step == self.steps, self._pause
        every = self._evaluate_every
        evaluate = bool(every) and (last or self.step % every == 0)
        if pause is not None and self._evaluate is not None:
            evaluate = last or self.step in pause.at
        every = self.settings.checkpoint_every or 0
        save = stopped or timed or last or (bool(every) and self.step % every == 0)
        save = save or (pause is not None and self.step == pause.until)
        if not (evaluate or save):
            return False
        self._flush_metrics()
        try:
            better = evaluate and self._evaluate_step()
        except Stopped:  # it may take longer than a scheduler waits: it is made when the training resumes
            if self._processes.world_size > 1:  # the others are in it
                raise
            self._due = True
        if self._due or save or better or self.worse is not None:
            self._save()
        return True

    def _evaluate_step(self) -> bool:
        """Evaluate. Returns whether the student is the best so far."""
        found = self._measures()
        name, before = self.settings.best, self._best.get("value")
        if name not in found:
            raise TrainError(f"best: got {name!r}; expected one of {', '.join(found)}.{did_you_mean(name, found)}")
        sign = sign_of(name)
        better = before is None or sign * found[name] < sign * before
        # the processes' values may differ in the last digit: the first one decides
        better = bool(self._processes.agree(int(better)))
        if better:
            self._best = {"step": self.step, "measure": name, "value": found[name]}
        self._evaluation = found
        if self._log is not None:
            self._log.write({"step": self.step, "evaluation": found})
        # of what is beside the student (NAME/MEASURE) the deciding measure alone: a line is to be read
        shown = {key: found[key] for key in distinct([found]) if "/" not in key or key.endswith(f"/{name}")}
        measures = ", ".join(f"{key} {measure_text(value)}" for key, value in shown.items())
        self._say(f"step {self.step} of {self.steps}: {measures}")
        self._progress.event("evaluation", step=self.step, measures=dict(found))
        by_window = getattr(self._evaluate, "evaluations", None)
        by_window = list(by_window) if isinstance(by_window, list) else []
        if by_window and self.step in self._kept_steps and self._processes.first:
            write_evaluations(self._out, self.step, by_window)
        self._look(lambda: by_window)
        return better

    def _look(self, evaluations: "Callable[[], list[Evaluation]]") -> None:
        """After a step: see whether the student is worse than one that it is watched beside. The first process decides.
        evaluations: of this step, by window."""
        if self._watch is None or self.step not in self._looks:
            return
        found = self._watch.look(self.step, evaluations(), self._looks) if self._processes.first else None
        self.worse = self._processes.gather(found)[0]
        if self.worse is not None:
            self.worse = replace(self.worse, kind=self._words.kind)
            self._say(f"stopped after step {self.step} of {self.steps}: {self.worse.sentence()}")

    def _measures(self) -> dict[str, float]:
        assert self._evaluate is not None
        self.student.eval()
        try:
            # in all of a run, so that its steps can be compared
            fake = nullcontext() if self.student.fake is None else self.student.fake.always()
            with fake, self._progress.hosting():
                found = dict(self._evaluate(self.student))
        except NotFinite as error:
            raise self._diverged(str(error), self.step, "held out") from error
        self._parallel.reshard()
        self.student.train()
        return found

    def _save(self) -> None:
        """Write a checkpoint. All metrics up to here are known to be finite."""
        tensors = {MODEL: model_tensors(self.student)}
        if not self._finished_without_optimizer:
            tensors[OPTIMIZER] = optimizer_tensors(self.optimizer, self.student)
        state = {
            "settings": self._fingerprint,
            "loader": self._source.state_dict(),
            "best": self._best,
            "metrics": self._metrics,
            "evaluation": self._evaluation,
            "processes": self._processes.world_size,
            "log": self._log and self._log.mark(),
        }
        if self._due:
            state["due"] = True
        if self._auto is not None:
            state["weights"] = self._auto.state_dict()
        if self._base is not None:
            state["base"] = self._base
        with writing(self._out, f"the checkpoint of step {self.step}"):
            with self._processes.all_or_none():
                if self._lock is not None and not os.path.samestat(os.fstat(self._lock), os.stat(self._out)):
                    raise FileNotFoundError(errno.ENOENT, "the folder was replaced", str(self._out))
            write(self._out, self.step, tensors, state, self._processes)
        if self._processes.first:
            prune(self._out, keep=self.settings.keep or KEEP, best=self._best.get("step"), last=self.step)
        self._checkpointed = self.step

    def _load(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        loaders = [state["loader"].get("fingerprint") or {}, self._source.fingerprint]
        check_same(state["settings"], self._fingerprint, str(checkpoint.folder), sources=loaders)
        if (began := state.get("base", self._base)) != self._base:
            raise TrainError(
                f"{checkpoint.folder}: got {self.student.name} with another base (sha256 {str(self._base)[:12]}…) than "
                f"the run began with (sha256 {str(began)[:12]}…), to which its adapter belongs. Give it that one, or "
                "train into another folder."
            )
        load_model(checkpoint, self.student, self._processes)
        kept = self.settings.keep is not None and checkpoint.shapes(OPTIMIZER)
        if checkpoint.step < self.steps or kept:  # it may be written again, after an evaluation that was stopped
            load_optimizer(checkpoint, self.optimizer, self.student, self._processes)
        self._source.load_state_dict(state["loader"])
        if self._auto is not None:
            self._auto.load_state_dict(state["weights"])
        self.step, self._due = checkpoint.step, bool(state.get("due")) and self._evaluate is not None
        self._best, self._metrics, self._evaluation = (state[name] for name in ("best", "metrics", "evaluation"))

    def _exported_checkpoint(self) -> Checkpoint:
        step = self._best.get("step", self.step) if self.settings.export == "best" else self.step
        found = read(self._out, step)
        if not isinstance(found, Checkpoint):
            raise TrainError(
                f"{self._out}: the {self.settings.export} checkpoint, of step {step}: {found}. Delete it, and train "
                "again; or export the other one (export='last' or 'best')."
            )
        return found

    def _export(self, folder: Path, frozen: Mapping[str, torch.Tensor]) -> None:
        """Write the trained student, or the students of which it is made. frozen: the base of adapters, to merge."""
        tensors = {**self._exported_checkpoint().tensors(MODEL), **frozen}
        if not self.student.parts:
            write_student(folder, self.student, tensors, self._tokenizer)
        write_beside(self._out, self.settings, self.student, tensors, self._tokenizer)
        for name, (student, tokenizer) in self.student.parts.items():
            prefix = f"model.{name}."
            own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
            write_student(folder / name, student, own, tokenizer)

    def _diverged(self, what: str, step: int, batch: str) -> Diverged:
        kept = f"The checkpoint of step {self._checkpointed} is kept" if self._checkpointed else "No checkpoint is kept"
        if (failed := getattr(self._source, "failed", None)) is not None and (why := failed()):
            what = f"{what}, since {why}"
        return Diverged(
            f"step {step}: {what} (batch: {batch}). {kept} in {self._out}. If the student has diverged: use a lower "
            "rate, a longer warm-up or a lower clip, and train into another folder.",
            step,
        )

    def _say(self, text: str) -> None:
        self._progress.event("note", text=text)


def _describe(step: Step) -> str:
    return f"epoch {step.epoch}, step {step.number} of it, {step.sequences} sequences, {step.positions} positions"
