"""What else there is of a student: its average and its early exits, which are evaluated, and exported on request; and
a copy with its adapters merged."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ..errors import TrainError
from ..models.tokenizers import Tokenizer
from ..settings import TrainSettings
from .checkpoint import model_tensors
from .ema import KIND, AveragedTeacher
from .exits import exit_students, write_exit
from .lora import MERGED, check_merge, merged
from .result import STUDENT, write_model
from .student import Student


def measured_beside(student: Student) -> Mapping[str, nn.Module]:
    """What is evaluated as a student beside it, by the prefix of its measures: "ema", "exit6"."""
    found: dict[str, nn.Module] = {KIND: student.live} if isinstance(student.live, AveragedTeacher) else {}
    return found | dict(exit_students(student))


def check_exports(settings: TrainSettings, student: Student) -> None:
    """Raise TrainError for an export of what the student does not have."""
    if settings.export_teacher and not isinstance(student.live, AveragedTeacher):
        raise TrainError(
            "export_teacher: got it, and no teacher that is made of the student; expected one, such as "
            "teacher='ema:0.999'."
        )
    if settings.lora_merge:
        if student.parts:
            raise TrainError("lora_merge: got it for students that learn from each other; expected none.")
        check_merge(student.model, student.name)


def folders_beside(out: Path, settings: TrainSettings) -> dict[str, Path]:
    """The folders that `write_beside` writes, by name: "ema", "exit6", "merged"."""
    names = [KIND] if settings.export_teacher else []
    names += [f"exit{settings.export_exit}"] if settings.export_exit is not None else []
    names += [MERGED] if settings.lora_merge else []
    return {name: out / f"{STUDENT}-{name}" for name in names}


def write_beside(
    out: Path, settings: TrainSettings, student: Student, tensors: Mapping[str, Tensor], tokenizer: Tokenizer | None
) -> None:
    """Write what the settings ask for beside OUT/student: OUT/student-ema, OUT/student-exit6, OUT/student-merged.
    tensors: of the whole `Student`, by name, and to merge adapters those of their base."""
    folders = folders_beside(out, settings)
    if settings.export_teacher:
        assert isinstance(student.live, AveragedTeacher)
        prefix = "live.model."
        plain = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        write_model(folders[KIND], student.live.model, plain, tokenizer, student.source)
    if (layers := settings.export_exit) is not None:
        write_exit(folders[f"exit{layers}"], student, layers, tensors, tokenizer)
    if settings.lora_merge:
        prefix = "model."
        whole = merged(student.model, {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)})
        write_model(folders[MERGED], whole, model_tensors(whole), tokenizer, student.source)
