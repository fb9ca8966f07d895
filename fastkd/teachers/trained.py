"""`--teacher trained:module:factory@RUN/student`: a module of yours with the weights that a training exported.

A student of transformers needs none of this: RUN/student is a folder as any other.
"""

from torch import nn

from ..errors import TeacherError
from ..models.trained import load_trained
from ..settings import ModelSettings
from ..utils.factories import is_factory, made_by
from .registry import register_teacher


@register_teacher("trained")
def load(name: str, settings: ModelSettings) -> nn.Module:
    factory, _, folder = name.partition("@")
    if not is_factory(factory) or not folder:
        raise TeacherError(
            f"teacher: got 'trained:{name}'; expected trained:module:factory@FOLDER, with the function that returns "
            "the student's module, and the folder student of its run."
        )
    made = made_by(factory, TeacherError)
    model = made() if callable(made) and not isinstance(made, nn.Module) else made
    if not isinstance(model, nn.Module):
        raise TeacherError(f"{factory}: returned {type(model).__name__}; expected a torch module.")
    return load_trained(model, folder, TeacherError).to(settings.device)
