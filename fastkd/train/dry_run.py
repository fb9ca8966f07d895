"""`fastkd train --dry-run`: what a training will take and write, from its data, its student and one step. Nothing is
written."""

import os
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..data.examples import as_examples
from ..errors import TrainError
from ..settings import TrainSettings
from ..utils.distributed import ALONE, local_device
from ..utils.numbers import duration, size_text
from ..utils.text import format_table, labelled, printable
from ..utils.words import counted
from .api import TrainCall, identity_of, outlined
from .arms import control_arms
from .batch import with_batch
from .beside import folders_beside
from .checkpoint import steps_of
from .exits import with_exits
from .held_out import HeldOut
from .inputs import Inputs
from .live_inputs import load_inputs
from .lora import MERGED
from .rehearsal import Rehearsal, StepCost
from .result import STUDENT
from .settings_check import check_begun
from .student import check_source, make_student
from .trainer import KEEP

SECONDS = 20.0
"""For which micro-batches are run, if two do not take longer."""
_NO_ROLLOUTS = "unknown: what the student continues itself is not measured"


@dataclass(frozen=True)
class TrainingPlan:
    """What a training will take.

    out: its folder. student: name, parameters, those that are trained. device: that it was measured on.
    steps, steps_per_epoch; positions: of an epoch, None if that is not known; batch: positions of a step, on average.
    evaluations: their number; held_out: sequences and positions of each, those that are known; without: why there are
    none, or "". resumed: the step of the newest checkpoint in the folder, or 0.
    arms: what is trained, by folder ("" for the student itself), and how.
    cost: what was measured, None if it was not; unknown: why, or "". hours: of all arms, from their first step on;
    evaluation_hours: of these.
    files: what will be written, in bytes as far as known (None), by path within `out`.
    notes: on the student, and warnings, as lines.
    """

    out: str
    student: dict[str, Any]
    device: str
    steps: int
    steps_per_epoch: int
    positions: int | None
    batch: float | None
    evaluations: int
    held_out: dict[str, int]
    without: str
    resumed: int
    arms: dict[str, str]
    cost: StepCost | None
    unknown: str
    hours: float | None
    evaluation_hours: float | None
    files: dict[str, int | None]
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def dry_run(call: TrainCall, *, seconds: float = SECONDS, begin: Callable[[], None] = lambda: None) -> TrainingPlan:
    """What `train` with these arguments will take.

    begin: callback, called after the arguments are checked and before anything is loaded. seconds: approximate time to
    run micro-batches for, once the student and any live teacher are loaded; at least two micro-batches run. Writes
    neither the run folder nor a cache. Single process only: several processes share each step.
    Raises what `train` raises before its first step.
    """
    if (count := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise TrainError(f"dry_run: got {count} processes; expected one. Run it without torchrun.")
    call = replace(call, data=as_examples(call.data))
    cached, settings, live, begun = call.checked()
    check_begun(call.out, settings, identity_of(cached, settings, live, call.data))
    check_source(call.student, settings, None if cached is None else cached.data)
    begin()
    processes = replace(ALONE, device=local_device(settings.device, TrainError))
    with torch.random.fork_rng(devices=[processes.device] if processes.device.type == "cuda" else []):
        # not with write_cache, and no folder for bases of features: both would be written
        inputs: Inputs = cached or load_inputs(call.teacher, call.data, settings, live, processes=processes)
        try:
            made = make_student(call.student, inputs.spec, settings, inputs.data)
            inputs.meet(made, settings, None)
            settings = with_batch(settings, inputs.size(settings), begun)
            held = inputs.evaluator(settings, processes)
            objective = inputs.matched(settings, made.student, None)
            if settings.exits:
                objective = with_exits(settings, made.student, objective, inputs.data)
            trainer = Rehearsal(
                made, inputs.open(settings, processes, objective), processes, settings, call.out, objective=objective,
                evaluate=held,
            )  # fmt: skip
            try:
                return _plan(trainer, inputs, held, settings, call, seconds)
            finally:
                trainer.close()
        finally:
            inputs.close()


def _plan(
    trainer: Rehearsal,
    inputs: Inputs,
    held: HeldOut | None,
    settings: TrainSettings,
    call: TrainCall,
    seconds: float,
) -> TrainingPlan:
    out, student, source = call.out, trainer.student, trainer.source
    outline = outlined(inputs, settings, len(source))
    positions = getattr(source, "positions", None)
    arms = {"": "the student, with its own settings"}
    arms |= {arm.folder: f"the same student {arm.says}" for arm in control_arms(settings, None)} if call.control else {}
    cost, unknown = None, _NO_ROLLOUTS if call.rollouts.rollouts else ""
    if not unknown:
        cost = trainer.measure(seconds)
    hours = evaluation_hours = None
    if cost is not None:
        evaluated = outline.evaluations * ((held.positions if held is not None else 0) or 0)
        evaluation_hours = len(arms) * evaluated * cost.evaluation_seconds / 3600
        hours = len(arms) * trainer.steps * cost.step_seconds / 3600 + evaluation_hours
    trained = sum(p.numel() for p in student.model.parameters() if p.requires_grad)
    about = {"name": student.name, "parameters": student.parameters_and_bytes[0], "trained": trained}
    sizes = {} if held is None else {"sequences": held.sequences, "positions": held.positions}
    notes = [f"note: student: {note}" for note in student.notes] + outline.warnings
    return TrainingPlan(
        out=str(out),
        student=about,
        device=str(trainer.device),
        steps=outline.steps,
        steps_per_epoch=outline.per_epoch,
        positions=positions,
        batch=None if positions is None else positions / len(source),
        evaluations=outline.evaluations,
        held_out={name: n for name, n in sizes.items() if n is not None},
        without="" if held is not None else inputs.nothing_held_out() or "evaluate_every is 0",
        resumed=max(steps_of(out), default=0),
        arms=arms,
        cost=cost,
        unknown=unknown,
        hours=hours,
        evaluation_hours=evaluation_hours,
        files=_files(trainer, out, settings, arms, held, call.write_cache),
        notes=notes,
    )


def _files(
    trainer: Rehearsal,
    out: Path,
    settings: TrainSettings,
    arms: Mapping[str, str],
    held: HeldOut | None,
    write_cache: Any,
) -> dict[str, int | None]:
    weights, state = trainer.checkpoint_bytes()
    kept = settings.keep or KEEP
    each: dict[str, int | None] = {"run.json": None, "metrics.jsonl": None}
    each |= {} if held is None else {"evaluation.json": None, "evaluations/": None}
    # the best one is kept beside the last ones, where there are evaluations
    each["checkpoints/"] = (kept + (held is not None)) * (weights + state)
    each |= {f"{STUDENT}/": weights}
    whole = trainer.student.parameters_and_bytes[1]
    each |= {f"{path.name}/": whole if name == MERGED else None for name, path in folders_beside(out, settings).items()}
    found = {f"{arm}/{name}" if arm else name: size for arm in arms for name, size in each.items()}
    return found | ({} if write_cache is None else {str(write_cache): None})


def dry_run_text(plan: TrainingPlan) -> str:
    """The plan as text for 80 columns."""
    about, lines = plan.student, ["fastkd train, dry run: nothing is written"]
    trained = "" if about["trained"] == about["parameters"] else f", {about['trained']:,} of them trained"
    lines += labelled("  student", f"{about['name']}: {about['parameters']:,} parameters{trained}")
    lines += labelled("  device", plan.device)
    steps = counted(plan.steps, "step")
    if plan.positions is not None and plan.batch is not None:
        mean = "about " * (plan.steps_per_epoch > 1) + counted(round(plan.batch), "position")
        steps += f" of {mean}; an epoch has "
        steps += f"{plan.steps_per_epoch:,} of them, {counted(plan.positions, 'position')}"
    lines += labelled("  training", steps)
    if plan.resumed:
        then = "all steps are made" if plan.resumed >= plan.steps else "the training goes on from there"
        lines += labelled("  checkpoint", f"of step {plan.resumed:,} in {plan.out}: {then}")
    evaluations = f"none: {plan.without}"
    if not plan.without:
        what = " and ".join(f"{n:,} {name}" for name, n in plan.held_out.items()) or "the held-out split"
        evaluations = f"{plan.evaluations:,}, each on {what} that are held out"
    lines += labelled("  evaluations", evaluations)
    for number, (folder, says) in enumerate(plan.arms.items()):
        lines += labelled("  compared" if not number else "", f"{says}: {Path(plan.out, folder)}")
    lines += ["", "Memory", *_memory_lines(plan)]
    lines += ["", "Time", *_time_lines(plan)]
    lines += ["", f"Files in {plan.out}"]
    lines += format_table([[f"  {name}", "small" if n is None else size_text(n)] for name, n in plan.files.items()])
    lines += ["  (checkpoints: at most; once finished, weights of the last and the best)"]
    lines += [""] * bool(plan.notes)
    for note in plan.notes:
        lines += textwrap.wrap(note, 80, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(printable(line).rstrip() for line in lines)


def _memory_lines(plan: TrainingPlan) -> list[str]:
    if (cost := plan.cost) is None:
        return labelled("  all", plan.unknown)
    names = {"activations": "activations of a micro-batch", "optimizer": "optimizer's state"}
    lines = []
    for name, size in cost.memory.items():
        known = size_text(size) if size or name != "activations" else "unknown, with compile"
        lines += labelled(f"  {name}", f"{known}{f' ({names[name]})' if name in names else ''}")
    lines += labelled("  together", f"{size_text(sum(cost.memory.values()))}, and what a step needs in between")
    if cost.peak is not None:
        lines += labelled("  peak", f"{size_text(cost.peak)} on {plan.device}, measured")
    return lines


def _time_lines(plan: TrainingPlan) -> list[str]:
    if plan.cost is None or plan.hours is None or plan.evaluation_hours is None:
        return labelled("  all", plan.unknown)
    cost = plan.cost
    batches = f"{cost.micro_batches:,} micro-batch{'es' * (cost.micro_batches > 1)}"
    measured = f"{_short(cost.step_seconds)}, of {batches}; {cost.run:,} were run"
    lines = labelled("  a step", measured)
    several = f" for {len(plan.arms)} trainings" if len(plan.arms) > 1 else ""
    share = f", {duration(plan.evaluation_hours * 3600)} of it for evaluations" if plan.evaluations else ""
    return lines + labelled("  all", f"about {duration(plan.hours * 3600)}{several}{share}")


def _short(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 10 else duration(seconds)
