"""Parse the command line into one of the commands, by tyro, with help and shell completion; name settings by flags."""

import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import fields, replace
from functools import partial, reduce
from operator import or_
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TextIO, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import (
    MISSING_NONPROP,
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from ..utils.secrets import masked
from .commands import COMMANDS

_METAVARS = {str: "STR", int: "INT", float: "FLOAT", Path: "PATH"}
_ABOUT = (
    "Knowledge distillation from a cached teacher: a teacher runs once and fills a cache, then students train from it. "
    "`fastkd COMMAND --help` shows the options of a command, `fastkd --version` the version."
)


def parse(args: Sequence[str]) -> Any:
    """Parse arguments into one of `COMMANDS`. Raises SystemExit after printing help or a usage error."""
    args = _repeated(args) if args else ["--help"]
    try:
        return _parse(args, aloud=False)
    except SystemExit as stop:
        if stop.code:
            args = masked(args)  # the message quotes the arguments, and a URL may contain a password
        try:
            _parse(args, aloud=True)
        except OSError:  # a closed pipe or a full disk: the status is what remains to say
            for stream in (sys.stdout, sys.stderr):
                discard(stream)
        raise stop from None


def discard(stream: TextIO) -> None:
    """Send what is printed to a stream nowhere from now on, if it cannot be written."""
    try:
        stream.flush()
    except OSError:
        # otherwise Python's flush at exit would raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


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


def _repeated(args: Sequence[str]) -> list[str]:
    """Arguments in which flags that take several values, and are repeated, stand once with all of them: the last would
    replace the others. A value that begins with a dash follows an equals sign (`--match=-1:8:mse:1`)."""
    hints = get_type_hints(COMMANDS[args[0]], include_extras=True) if args[0] in COMMANDS else {}
    several = {"--" + name.replace("_", "-") for name, kind in hints.items() if get_args(kind)[1:] == (...,)}
    values: dict[str, list[str]] = {}
    kept: list[str] = []
    latest: list[str] | None = None  # the values of the flag that is being read
    for argument in args:
        flag, equals, value = argument.partition("=")
        if flag in several:
            if flag not in values:
                kept.append(flag)
            latest = values.setdefault(flag, [])
            latest += [value] if equals else []
            latest = None if equals else latest
        elif latest is None or re.match(r"--|-[^0-9]", argument):
            kept.append(argument)
            latest = None
        else:
            latest.append(argument)
    return [one for argument in kept for one in (argument, *values.get(argument, ()))]


def _parse(args: Sequence[str], *, aloud: bool) -> Any:
    # the first paragraph in the list of commands; the whole text in the help of one command
    brief = not args or args[0].startswith("-")
    commands: list[Any] = []
    for name, command in COMMANDS.items():
        text = inspect.getdoc(command) or ""
        about = text.split("\n\n")[0] if brief else text
        commands.append(Annotated[command, tyro.conf.subcommand(name, description=about)])
    return tyro.cli(
        reduce(or_, commands),
        prog="fastkd",
        description=_ABOUT,
        args=args,
        config=(tyro.conf.FlagCreatePairsOff,),
        console_outputs=aloud,
        registry=_registry(),
    )


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


_VALUE = r"""("[^"]*"|'[^']*'|[\w.+-]*\w)"""


def in_flags(text: str, flags: Mapping[str, str]) -> str:
    """Replace names of settings in a message by their flags. flags: from a setting's name to its flag.

    `held_out: got 1.5; expected less` becomes `--held-out 1.5: expected less`, `Use export='last'` becomes `Use
    --export last`, and a name with an underscore becomes its flag wherever it stands alone. Paths are not changed.
    """
    if not flags:
        return text
    names = "|".join(sorted(map(re.escape, flags), key=len, reverse=True))
    words = "|".join(sorted((re.escape(name) for name in flags if "_" in name), key=len, reverse=True)) or r"(?!)"

    def assigned(found: re.Match[str]) -> str:
        value = _bare(found[2] or "")
        return flags[found[1]] + (f" {value}" if value not in ("", "True") else "")

    text = re.sub(rf"^({names}): got {_VALUE}; ", lambda m: f"{flags[m[1]]} {_bare(m[2])}: ", text)
    listed = rf"^((?:{names})(?:, (?:{names}))*)(?=: )"
    text = re.sub(listed, lambda m: ", ".join(flags[name] for name in m[1].split(", ")), text)
    text = re.sub(rf"(?<=[ (])({names})={_VALUE}?(?![\w/=]|,\w)", assigned, text)
    # lists of differences: (there, and now: k: 8 and 9; mass: None and 0.5)
    text = re.sub(rf"(?:(?<=now: )|(?<=settings \()|(?<=; ))({names})(?=: )", lambda m: flags[m[1]], text)
    return re.sub(rf"(?<![\w./'\"-])({words})(?![\w/'\"(=-]|\.\w)", lambda m: flags[m[1]], text)


def _bare(value: str) -> str:
    return value.strip("\"'")
