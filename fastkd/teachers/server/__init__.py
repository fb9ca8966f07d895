"""`--teacher http://host:port`: a server of vLLM or SGLang, which answers with top-k log-probabilities.

Belongs here: the HTTP client, and one module for each kind of server: what it is asked, and what its answers mean.
Does not: models in this process, whatever engine runs them.
"""

from ...errors import TeacherError
from ...settings import ModelSettings
from ..options import parse_options
from ..registry import register_teacher
from .options import ServerOptions
from .teacher import ServerTeacher

__all__ = ["ServerOptions", "ServerTeacher"]

_OF_LOADING = ("revision", "dtype", "attention", "trust_remote_code")
_DEFAULTS = ModelSettings()


@register_teacher("http://")
@register_teacher("https://")
def load(url: str, settings: ModelSettings) -> ServerTeacher:
    """A server as a teacher. Nothing is asked of it yet."""
    if given := [name for name in _OF_LOADING if getattr(settings, name) != getattr(_DEFAULTS, name)]:
        raise TeacherError(
            f"{given[0]}: got {getattr(settings, given[0])!r} for a server; expected the default: the "
            "server loads its model, so start that with it."
        )
    options = parse_options(settings.teacher_options, ServerOptions, "a server")
    return ServerTeacher(url, options, device=settings.device or "cpu")
