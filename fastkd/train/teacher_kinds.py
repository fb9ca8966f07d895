"""Kinds of live teachers that are made of the student, such as `--teacher ema:0.999`, by the text before the colon.

A kind is a module of this room with a function `teacher_kind(text)`, and a line of `KINDS`. The function reads the text
after the colon, raising TrainError before anything is loaded, and returns a function that makes the teacher, once the
student is made: an `InForward`, which answers micro-batches inside the student's forward.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from ..settings import CaptureSettings
from .in_forward import InForward
from .student import Student

MakeTeacher = Callable[[Student, CaptureSettings], InForward]
"""From the student, and the settings by which `fastkd.live.answer` makes targets of answers, to the student's teacher.
"""

KINDS: dict[str, str] = {"ema": "ema"}
"""Modules of `fastkd.train` by kind."""


def find_kind(teacher: str) -> MakeTeacher | None:
    """What makes the teacher of a name KIND:TEXT; None for a name of another kind of teacher."""
    kind, colon, text = teacher.partition(":")
    if kind not in KINDS or (not colon and Path(teacher).exists()):
        return None
    made: MakeTeacher = import_module(f".{KINDS[kind]}", __package__).teacher_kind(text)
    return made
