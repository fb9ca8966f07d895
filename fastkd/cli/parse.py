"""Parse the command line into one of the commands, with help and shell completion, by tyro."""

import inspect
import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import fields, replace
from functools import partial, reduce
from operator import or_
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import (
    MISSING_NONPROP,
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from .commands import COMMANDS

_METAVARS = {str: "STR", int: "INT", float: "FLOAT", Path: "PATH"}
_ABOUT = (
    "Knowledge distillation from a cached teacher: a teacher runs once and fills a cache, then students train from it. "
    "`fastkd COMMAND --help` shows the options of a command, `fastkd --version` the version."
)


def parse(args: Sequence[str]) -> Any:
    """Parse arguments into one of `COMMANDS`. Raises SystemExit after printing help or a usage error."""
    if not args:
        args = ["--help"]
    try:
        return _parse(args, aloud=False)
    except SystemExit as stop:
        if stop.code:
            from ..cache.credentials import redact

            # the message quotes the arguments, and a URL may contain a password
            args = [redact(arg) for arg in args]
        _parse(args, aloud=True)
        raise


def completion_script(shell: str) -> str:
    """Completion script for a shell: "bash", "zsh" or "fish"."""
    printed = io.StringIO()
    with redirect_stdout(printed), suppress(SystemExit):
        _parse(["--tyro-write-completion", shell, "-"], aloud=True)
    return printed.getvalue()


def flags(command: Any) -> dict[str, str]:
    """Flag of each setting of a command; positional arguments have none."""
    hints = get_type_hints(type(command), include_extras=True)
    return {
        field.name: "--" + field.name.replace("_", "-")
        for field in fields(command)
        if tyro.conf.Positional not in getattr(hints[field.name], "__metadata__", ())
    }


def _parse(args: Sequence[str], *, aloud: bool) -> Any:
    # the first paragraph in the list of commands; the whole text in the help of one command
    brief = not args or args[0].startswith("-")
    union: Any = reduce(or_, (_subcommand(name, command, brief) for name, command in COMMANDS.items()))
    return tyro.cli(
        union,
        prog="fastkd",
        description=_ABOUT,
        args=args,
        config=(tyro.conf.FlagCreatePairsOff,),
        console_outputs=aloud,
        registry=_registry(),
    )


def _subcommand(name: str, command: type, brief: bool) -> Any:
    text = inspect.getdoc(command) or ""
    return Annotated[command, tyro.conf.subcommand(name, description=text.split("\n\n")[0] if brief else text)]


def _registry() -> ConstructorRegistry:
    """How fields are shown in the help: required ones first, optional ones without an uninformative default."""
    registry, inner = ConstructorRegistry(), False

    def shown(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal inner
        if inner or info.type not in COMMANDS.values():
            return None
        inner = True
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            inner = False
        assert isinstance(spec, StructConstructorSpec)
        order = sorted(map(_shown, spec.fields), key=lambda field: field.default is not MISSING_NONPROP)
        return replace(spec, fields=tuple(order))

    registry.struct_rule(shown)
    return registry


def _shown(field: StructFieldSpec) -> StructFieldSpec:
    kind: Any = field.type
    options: dict[str, Any] = {}
    if field.default is None or field.default is False or field.default == ():
        options["help_behavior_hint"] = ""
    if get_origin(kind) in (Union, UnionType):
        (given,) = (option for option in get_args(kind) if option is not NoneType)
        options["metavar"] = _METAVARS[given] + "|None" * (field.default is not None)
    if options:
        kind = Annotated[kind, tyro.conf.arg(**options)]
    return replace(field, type=kind, helptext=partial(_one_line, field.helptext))


def _one_line(text: str | Callable[[], str | None] | None) -> str:
    """A docstring as one line. tyro passes a callable that reads the source lazily."""
    found = text() if callable(text) else text
    return " ".join((found or "").split())
