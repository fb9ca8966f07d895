"""The results of a run: the exported student, run.json, and the report that `fastkd.train` returns."""

import errno
import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .. import __version__
from ..cache.reader import Cache
from ..evaluate.measures import distinct, explained
from ..models.adapters import is_wrapped, save_adapter
from ..models.hub import ModelFiles
from ..models.tokenizers import Tokenizer
from ..utils.atomic import write_folder
from ..utils.intervals import NO_INTERVAL
from ..utils.numbers import difference_text, measure_text
from ..utils.signals import DONE, WORK_REMAINS
from ..utils.text import format_table
from ..utils.words import KINDS
from .arms import CONTROL, WITHOUT_FEATURES
from .card import written_by_fastkd
from .lora import describe_adapters
from .outline import FEW_STEPS, HeldOutSize, few_steps
from .student import Student
from .verdict import NOT_KNOWN, Verdict

STUDENT = "student"
CARD = "README.md"
STUDENTS = "students"  # a folder of each, by name
RUN = "run.json"
_LIBRARIES = ("torch", "transformers", "peft", "safetensors", "numpy", "zarr", "triton")


@dataclass(frozen=True)
class TrainReport:
    """What `fastkd.train` returns.

    out: the run's folder. step, steps: steps made, and in all. resumed: the step of the checkpoint it resumed from, or
    0. metrics: of the last step. evaluation: the last measures on the held-out split (at the end, of the exported
    student), empty without evaluations; best: step and value of the best ones. In this call: positions (that went
    through the student), seconds (of its steps) and waiting (fraction of them without a batch). student: folder of the
    exported student, None while work remains; exported: of what else was exported, by name. control: the report of the
    control, trained on hard labels alone. without_features: that of the same student without the features that it
    matches. verdicts: of the comparisons with both, by folder, if they were evaluated by window; not_compared: why
    there are none, or "". held_out: documents, windows and positions that it was evaluated on. stopped_worse: the
    comparison that ended the training before its last step (`stop_if_worse`), None if there was none. unfinished: what
    else the same call again has to do, as shards of a cache that is written; or "". pushed: the URL that the student
    was uploaded to; push_failed: why it was not; None if it was not to be, or not yet. kind: of the data; see
    `fastkd.utils.words`.
    """

    out: str
    step: int
    steps: int
    resumed: int
    metrics: dict[str, Any]
    evaluation: dict[str, float]
    best: dict[str, Any]
    positions: int = 0
    seconds: float = 0.0
    waiting: float = 0.0
    student: str | None = None
    exported: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    control: "TrainReport | None" = None
    without_features: "TrainReport | None" = None
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    not_compared: str = ""
    held_out: dict[str, Any] = field(default_factory=dict)
    stopped_worse: Verdict | None = None
    unfinished: str = ""
    pushed: str | None = None
    push_failed: str | None = None
    kind: str = "text"

    @property
    def arms(self) -> "dict[str, TrainReport]":
        """The reports of what was trained beside the student, by folder."""
        arms = {WITHOUT_FEATURES: self.without_features, CONTROL: self.control}
        return {name: arm for name, arm in arms.items() if arm is not None}

    @property
    def complete(self) -> bool:
        """Whether all steps are made, including those of the control, and of the arm without features; or the training
        was ended since the student is worse. And whether nothing else is unfinished."""
        ended = self.step >= self.steps or self.stopped_worse is not None
        return ended and not self.unfinished and all(arm.complete for arm in self.arms.values())

    @property
    def status(self) -> int:
        """Exit status: 1 if only the upload failed."""
        done = 1 if self.push_failed else DONE
        return done if self.complete else WORK_REMAINS

    def to_json(self) -> dict[str, Any]:
        """As JSON; with a control, `difference` has each measure of the student minus the control's. The arm without
        features, and verdicts, are there if they were measured."""
        found = asdict(replace(self, control=None, without_features=None, verdicts={}, stopped_worse=None))
        del found["without_features"], found["verdicts"], found["stopped_worse"]
        for name in ("unfinished", "pushed", "push_failed", "not_compared", "held_out"):
            if not found[name]:
                del found[name]
        if self.kind == "text":
            del found["kind"]
        found |= {"complete": self.complete} | {name: arm.to_json() for name, arm in self.arms.items()}
        if self.control is not None:
            theirs = self.control.evaluation
            found["difference"] = {n: v - theirs[n] for n, v in self.evaluation.items() if n in theirs}
        if self.stopped_worse is not None:
            found["stopped_worse"] = self.stopped_worse.to_json()
        if self.verdicts:
            found["verdicts"] = {name: one.to_json() for name, one in self.verdicts.items()}
        return found


def report_of(report: TrainReport) -> str:
    if report.unfinished:
        return f"{report.out}: all steps are made. {report.unfinished}. Run the same command again to resume."
    if not report.complete:
        part = next((arm for arm in report.arms.values() if not arm.complete), report)
        return stopped_text(part)
    positions = KINDS[report.kind].positions
    speed = f"{report.positions / report.seconds:,.0f} {positions}/s, " if report.seconds else ""
    steps = f"{report.step} step{'s' * (report.step != 1)}"
    lines = [f"{report.out}: {steps} ({speed}{report.waiting:.1%} of the time waiting for data)"]
    if report.stopped_worse is not None:
        lines.append(f"stopped after step {report.step} of {report.steps}: {report.stopped_worse.sentence()}")
    lines += [f"note: {note}" for note in report.notes]
    if report.evaluation:
        columns = _by_part(report.evaluation)
        if report.control:
            columns |= {"control": report.control.evaluation}
        if report.without_features:
            columns["without features"] = report.without_features.evaluation
        if report.stopped_worse is not None:  # the control went on
            both = {STUDENT: report.step, CONTROL: report.steps}
            columns = {f"{name}, step {both[name]}" if name in both else name: c for name, c in columns.items()}
        names = distinct(columns.values())
        rows = [[n, *(measure_text(c.get(n)) for c in columns.values())] for n in names]
        heads = ["held out", *columns]
        if report.control:  # after the control
            at = heads.index(next(head for head in heads if head.startswith(CONTROL))) + 1
            difference = _differences(report)
            rows = [[*row[:at], difference.get(row[0], ""), *row[at:]] for row in rows]
            heads.insert(at, "difference")
        lines += format_table([heads, *rows])
        lines += about_evaluation(report, names)
    for one in report.verdicts.values():
        lines += one.lines
    if report.not_compared:
        lines.append(f"not compared: {report.not_compared}")
    if report.steps < FEW_STEPS:
        lines.append(f"note: {few_steps(report.steps)}; a comparison after fewer than {FEW_STEPS} says little.")
    lines.append(f"student: {report.student}")
    if report.pushed:
        lines.append(f"uploaded to {report.pushed}")
    return "\n".join(lines + [f"{name}: {folder}" for name, folder in report.exported.items()])


def _differences(report: TrainReport) -> dict[str, str]:
    """The student minus the control, by measure, with half the interval where it is known."""
    judged = report.verdicts[CONTROL].difference if CONTROL in report.verdicts else {}
    plain: Mapping[str, float] = report.to_json()["difference"]
    return {
        name: difference_text(*judged[name]) if name in judged else f"{value:+z.4f}" for name, value in plain.items()
    }


def about_evaluation(report: TrainReport, names: Sequence[str]) -> list[str]:
    """What was evaluated on, what the differences say, and what the abbreviations among the names of measures are."""
    parts = []
    if held := report.held_out:
        parts.append(f"measured on {HeldOutSize(**held)}")
    if CONTROL in report.verdicts:
        known = report.verdicts[CONTROL].overall != NOT_KNOWN
        paired = f"differences ± an interval of 95%, paired by {KINDS[report.kind].window}"
        parts.append(paired if known else f"differences have {NO_INTERVAL}")
    return [*(["; ".join(parts)] if parts else []), *explained(names, KINDS[report.kind])]


def stopped_text(part: TrainReport) -> str:
    """Where a training was stopped, which has written a checkpoint there."""
    kept = f"the checkpoint of step {part.step} has all that was done" if part.step else "no step was made"
    return f"{part.out}: stopped after step {part.step} of {part.steps}: {kept}. Run the same command again to resume."


def _by_part(evaluation: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The measures of the student, and of what was measured beside it ("ema/accuracy"), by their own names."""
    found: dict[str, dict[str, float]] = {STUDENT: {}}
    for name, value in evaluation.items():
        part, _, own = name.rpartition("/")
        found.setdefault(part or STUDENT, {})[own] = value
    return found


def write_student(folder: Path, student: Student, tensors: Mapping[str, Tensor], tokenizer: Tokenizer | None) -> None:
    """Write the trained model: one of transformers with its config (and tokenizer), for
    `AutoModelForCausalLM.from_pretrained`; of one with an adapter the adapter's folder, for
    `PeftModel.from_pretrained`; any other module as model.safetensors, with the names of its state dict.

    tensors: of the whole `Student`, by name.
    """
    prefix = "model."  # an objective's own tensors are not part of the model
    plain = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    write_model(folder, student.model, plain, tokenizer, student.source)


def write_model(
    folder: Path,
    model: Any,
    tensors: Mapping[str, Tensor],
    tokenizer: Tokenizer | None,
    source: ModelFiles | None = None,
) -> None:
    """Write a model with these weights, by the names of its own; see `write_student`. Its own may be meta tensors.

    source: the files that it was made from; its licenses and generation config are kept. A card in the folder that a
    person wrote is kept as well.
    """
    card = folder / CARD
    written = card.read_bytes() if card.is_file() else None
    kept = None if written is None or written_by_fastkd(written.decode(errors="replace")) else written

    def fill(place: Path) -> None:
        try:
            if is_wrapped(model):
                save_adapter(model, place, tensors)
            elif hasattr(model, "save_pretrained"):
                model.save_pretrained(place, state_dict=dict(tensors))
            else:
                save_file(dict(tensors), place / "model.safetensors")
        except SafetensorError as error:  # as of a full disk
            raise OSError(errno.EIO, str(error)) from error
        if not hasattr(model, "save_pretrained"):
            (place / "README.txt").write_text(
                f"model.safetensors: parameters and buffers of {type(model).__module__}.{type(model).__qualname__}.\n"
                "Load them into such a module with load_state_dict(safetensors.torch.load_file(...), strict=False).\n"
            )
        if tokenizer is not None:
            tokenizer.save(place)
        for path in source.kept if source is not None else ():
            shutil.copyfile(path, place / path.name)
        (place / CARD).unlink(missing_ok=True)  # of a library, which knows less than ours
        if kept is not None:
            (place / CARD).write_bytes(kept)

    write_folder(folder, fill)


def run_document(
    student: Student, size: tuple[int, int], inputs: Mapping[str, Any], device: torch.device, world_size: int
) -> dict[str, Any]:
    """What every run.json has: the student, its size (parameters and bytes), its data and the machine.

    inputs: describes the data; {"caches": [`describe_cache`, ...]} for caches.
    """
    described = describe_student(student, size) | ({} if student.given is None else {"given": student.given})
    if student.given_files is not None:
        described["given_files"] = student.given_files
    described |= {"notes": student.notes, "vocab_size": student.vocab_size}
    return {
        "format": "fastkd-run",
        "version": 1,
        "student": described,
        **inputs,
        "machine": machine(device, world_size),
    }


def describe_student(student: Student, size: tuple[int, int]) -> dict[str, Any]:
    """Name, parameters and bytes, class, and where they are known the name of the model that it began as, and its
    license."""
    kind = type(student.network)
    found: dict[str, Any] = {"name": student.name, "parameters": size[0], "bytes": size[1]}
    found["class"] = f"{kind.__module__}.{kind.__qualname__}"
    if student.base is not None:
        found["base"] = student.base
    if student.source is not None and student.source.license:
        found["license"] = student.source.license
    return found | describe_adapters(student.model)


def describe_cache(cache: Cache) -> dict[str, Any]:
    spec = cache.spec
    positions, size = (int(cache.manifest.column(name).to_numpy().sum()) for name in ("positions", "bytes"))
    names = (
        "inputs",
        "vocab_size",
        "k",
        "draws",
        "draw_temperature",
        "mass",
        "temperatures",
        "teacher",
        "tokenizer",
        "dataset",
    )
    return {
        "place": cache.store.describe(),
        "spec": spec.hash,
        **{name: getattr(spec, name) for name in names},
        "notes": spec.notes,
        "shards": len(cache.shards),
        "positions": positions,
        "bytes": size,
        "bytes_per_position": size / max(positions, 1),
    }


def machine(device: torch.device, world_size: int) -> dict[str, Any]:
    found: dict[str, Any] = {"fastkd": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    found |= {"machine": platform.machine(), "system": platform.system(), "processors": os.cpu_count()}
    found |= {"processes": world_size, "threads": torch.get_num_threads(), "device": str(device)}
    return found | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


def command_line() -> list[str]:
    """The command line of this process; empty if there is none."""
    if not sys.argv or not sys.argv[0]:
        return []
    path = Path(sys.argv[0])
    begin = ["python", "-m", path.parent.name] if path.name == "__main__.py" else [path.name]
    return [*begin, *sys.argv[1:]]
