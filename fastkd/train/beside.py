"""What else there is of a student: its average and its early exits, which are evaluated, and exported on request."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ..errors import TrainError
from ..models.tokenizers import Tokenizer
from ..settings import TrainSettings
from .ema import KIND, AveragedTeacher
from .exits import exit_students, write_exit
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


def folders_beside(out: Path, settings: TrainSettings) -> dict[str, Path]:
    """The folders that `write_beside` writes, by name: "ema", "exit6"."""
    names = [KIND] if settings.export_teacher else []
    names += [f"exit{settings.export_exit}"] if settings.export_exit is not None else []
    return {name: out / f"{STUDENT}-{name}" for name in names}


def write_beside(
    out: Path, settings: TrainSettings, student: Student, tensors: Mapping[str, Tensor], tokenizer: Tokenizer | None
) -> None:
    """Write what the settings ask for beside OUT/student: OUT/student-ema, OUT/student-exit6. tensors: of the whole
    `Student`, by name."""
    folders = folders_beside(out, settings)
    if settings.export_teacher:
        assert isinstance(student.live, AveragedTeacher)
        prefix = "live.model."
        plain = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        write_model(folders[KIND], student.live.model, plain, tokenizer, student.source)
    if (layers := settings.export_exit) is not None:
        write_exit(folders[f"exit{layers}"], student, layers, tensors, tokenizer)
