"""What a run leaves: a student that others load, run.json, and the report that `fastkd.train` returns."""

import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .. import __version__
from ..cache.reader import Cache
from ..models.tokenizers import Tokenizer
from ..utils.atomic import write_folder
from ..utils.signals import DONE, WORK_REMAINS
from .student import Student

STUDENT = "student"
RUN = "run.json"
CONTROL = "control"
_LIBRARIES = ("torch", "transformers", "safetensors", "numpy", "zarr", "triton")


@dataclass(frozen=True)
class TrainReport:
    """What a training did.

    out: the run's folder. step, steps: made, and to be made in all. resumed: the step it went on from, 0 at the
    beginning. metrics: the last step's figures. evaluation: the last measures on the held-out split (at the end those
    of the student that is the result), empty where there were none; best: the step, and the value, of the best ones.
    positions, seconds, waiting: of this call: positions that went through the student, the time its steps took, and the
    share of it in which there was no batch. student: the folder of the result. control: the same of the student on hard
    labels alone.
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
    notes: list[str] = field(default_factory=list)
    control: "TrainReport | None" = None

    @property
    def complete(self) -> bool:
        """Whether all steps are made, the control's too."""
        return self.step >= self.steps and (self.control is None or self.control.complete)

    @property
    def status(self) -> int:
        """Exit status: 0, or 75 where work remains."""
        return DONE if self.complete else WORK_REMAINS

    def to_json(self) -> dict[str, Any]:
        """All of it; with a control, `difference` has each measure of the student minus the control's."""
        found = asdict(self) | {"complete": self.complete}
        if self.control is not None:
            theirs = self.control.evaluation
            found["control"] = self.control.to_json()
            found["difference"] = {n: v - theirs[n] for n, v in self.evaluation.items() if n in theirs}
        return found


def report_of(report: TrainReport) -> str:
    """The report for a person."""
    if not report.complete:
        part = report.control or report
        return f"{part.out}: stopped after step {part.step} of {part.steps}. The same command again goes on."
    speed = f"{report.positions / report.seconds:,.0f} positions/s, " if report.seconds else ""
    lines = [f"{report.out}: {report.steps} steps ({speed}{report.waiting:.1%} of the time waiting for data)"]
    lines += [f"note: {note}" for note in report.notes]
    columns = {"student": report.evaluation} | ({"control": report.control.evaluation} if report.control else {})
    if report.evaluation:
        difference = report.to_json().get("difference")
        columns |= {"difference": difference} if difference else {}
        lines.append(f"{'held out':<16}" + "".join(f"{name:>12}" for name in columns))
        for name in report.evaluation:
            lines.append(f"{name:<16}" + "".join(f"{column.get(name, math.nan):>12.4f}" for column in columns.values()))
    return "\n".join([*lines, f"the student: {report.student}"])


def write_student(folder: Path, student: Student, tensors: Mapping[str, Tensor], tokenizer: Tokenizer | None) -> None:
    """The student as others load it: a model of transformers with its config (and tokenizer), for
    `AutoModelForCausalLM.from_pretrained`; a module as model.safetensors, the names being its state's.

    tensors: the weights, of `model_tensors`.
    """
    prefix = "model."
    plain = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    model: Any = student.model

    def fill(place: Path) -> None:
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(place, state_dict=plain)
        else:
            save_file(plain, place / "model.safetensors")
            (place / "README.txt").write_text(
                f"model.safetensors: parameters and buffers of {type(model).__module__}.{type(model).__qualname__}.\n"
                "Load them into such a module with load_state_dict(safetensors.torch.load_file(...), strict=False).\n"
            )
        if tokenizer is not None:
            tokenizer.save(place)

    write_folder(folder, fill)


def run_document(
    student: Student, size: tuple[int, int], caches: Sequence[Cache], device: torch.device, world_size: int
) -> dict[str, Any]:
    """What every run.json says: of which student, of so many parameters and bytes, on which caches and machine."""
    parameters, bytes_ = size
    return {
        "format": "fastkd-run",
        "version": 1,
        "student": {
            "name": student.name,
            "parameters": parameters,
            "bytes": bytes_,
            "notes": student.notes,
            "vocab_size": student.vocab_size,
        },
        "caches": [description(cache) for cache in caches],
        "machine": machine(device, world_size),
    }


def description(cache: Cache) -> dict[str, Any]:
    """What run.json says of a cache."""
    spec = cache.spec
    positions, size = (int(cache.manifest.column(name).to_numpy().sum()) for name in ("positions", "bytes"))
    names = ("vocab_size", "k", "draws", "draw_temperature", "mass", "temperatures", "teacher", "tokenizer", "dataset")
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
    """Versions and hardware."""
    found: dict[str, Any] = {"fastkd": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    found |= {"machine": platform.machine(), "system": platform.system(), "processors": os.cpu_count()}
    found |= {"processes": world_size, "threads": torch.get_num_threads(), "device": str(device)}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def command_line() -> list[str]:
    """How this process was started; empty where it was not by a command."""
    if not sys.argv or not sys.argv[0]:
        return []
    path = Path(sys.argv[0])
    begin = ["python", "-m", path.parent.name] if path.name == "__main__.py" else [path.name]
    return [*begin, *sys.argv[1:]]
