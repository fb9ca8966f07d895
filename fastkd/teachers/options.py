"""Options of a kind of teacher, NAME=VALUE each, to the fields of a dataclass."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar, get_args

from ..errors import TeacherError

Options = TypeVar("Options")


def parse_options(texts: Sequence[str], kind: type[Options], what: str) -> Options:
    """An instance of a dataclass whose fields are int, float, bool or str (or None).

    texts: NAME=VALUE, or several of them with commas between. what: whose options they are, for messages.
    Raises TeacherError for another name, for a name given twice, and for a value of another type; no message has a
    value, which may be a secret in the wrong place.
    """
    found: Any = kind
    types = {field.name: list(get_args(field.type) or (field.type,)) for field in fields(found)}
    given: dict[str, Any] = {}
    for text in (part.strip() for whole in texts for part in whole.split(",")):
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in types:
            shown = name if equals and name.isidentifier() else "a text"
            raise TeacherError(
                f"teacher_options: got {shown}; expected NAME=VALUE of {what}, with a NAME among {', '.join(types)}."
            )
        if name in given:
            raise TeacherError(f"teacher_options: got {name} twice; expected it once.")
        given[name] = _value(name, value.strip(), types[name])
    return kind(**given)


def _value(name: str, text: str, types: list[Any]) -> Any:
    if bool in types and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        if kind in types:
            try:
                return kind(text)
            except ValueError:
                continue
    if str in types:
        return text
    expected = " or ".join(kind.__name__ for kind in types if kind is not type(None))
    raise TeacherError(f"teacher_options: {name}: got another type of value; expected {expected}.")
