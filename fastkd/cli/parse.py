"""Parse the command line into one of the commands, by tyro, with help in groups and shell completion."""

import inspect
import io
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import or_
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, NoReturn, TextIO, Union, get_args, get_origin

import tyro
from tyro.constructors import (
    MISSING_NONPROP,
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from ..utils.secrets import masked
from ..utils.similar import did_you_mean
from .commands import COMMANDS
from .config import read_config
from .groups import COMMAND_GROUPS, MAIN, grouped, spellings
from .options import CONFIG, PRINT_CONFIG, HelpWanted, UsageError, arguments, scan
from .outcome import say

_METAVARS = {str: "STR", int: "INT", float: "FLOAT", Path: "PATH"}
_ABOUT = (
    "Knowledge distillation from a cached teacher: a teacher runs once and fills a cache, then students train from it."
)
_MORE = (
    "`fastkd COMMAND --help` shows the options of a command, `fastkd COMMAND -h` a line of each, `fastkd --version` "
    "the version."
)
_CONFIG_HELP = "File of options, in TOML or YAML, such as the config.toml of a run. Typed options win over it."
_PRINT_HELP = "Print the options as TOML, for --config, and do nothing else."
_GROUP = "group "  # before the name of a group: a field may be called the same
_COLOURED = "\n\t\x1b"  # characters that help may have


@dataclass(frozen=True)
class Parsed:
    """A command as it was given. typed: the option that was typed for a setting, by the field's name."""

    name: str
    command: Any
    typed: dict[str, str]
    print_config: bool = False


def parse(args: Sequence[str]) -> Any:
    """Parse arguments into one of `COMMANDS`. Raises SystemExit after printing help or a usage error."""
    return parsed(args).command


def parsed(args: Sequence[str]) -> Parsed:
    """As `parse`, with what was typed."""
    try:
        return _parsed(args)
    except UsageError as error:
        say(f"fastkd: {error}", sys.stderr)
        raise SystemExit(2) from None


def _parsed(args: Sequence[str]) -> Parsed:
    if not args or args[0] in ("-h", "--help"):
        say(_overview())
        raise SystemExit(0)
    name, *rest = args
    if name not in COMMANDS:
        if name.startswith("-"):
            raise UsageError(f"{name}: got an option; expected a command first. `fastkd --help` lists them.")
        raise UsageError(f"{name}: no such command.{did_you_mean(name, COMMANDS)} `fastkd --help` lists them.")
    try:
        given = scan(name, rest)
    except HelpWanted as wanted:
        _show_help(name, brief=wanted.brief)
    values = {} if given.config is None else read_config(given.config, name)
    words = arguments(name, values | given.values)
    try:
        command = _parse(name, words)
    except SystemExit:
        _refuse(name, words)
    return Parsed(name, command, given.typed, given.print_config)


def completion_script(shell: str) -> str:
    """Completion script for a shell: "bash", "zsh" or "fish"."""
    commands: list[Any] = []
    for name, command in COMMANDS.items():
        about = (inspect.getdoc(command) or "").split("\n\n")[0]
        commands.append(Annotated[command, tyro.conf.subcommand(name, description=about)])
    printed = io.StringIO()
    with redirect_stdout(printed), suppress(SystemExit):
        tyro.cli(
            reduce(or_, commands),
            prog="fastkd",
            args=["--tyro-write-completion", shell, "-"],
            config=(tyro.conf.FlagCreatePairsOff,),
            registry=_registry(brief=False),
        )
    return printed.getvalue()


def _overview() -> str:
    """`fastkd --help`: the commands, by what they are for."""
    lines = ["usage: fastkd COMMAND [OPTIONS]", "", *textwrap.wrap(_ABOUT, _width())]
    for title, names in COMMAND_GROUPS.items():
        lines += ["", title]
        for name in names:
            text = (inspect.getdoc(COMMANDS[name]) or "").split("\n\n")[0]
            lines += textwrap.wrap(text, _width(), initial_indent=f"  {name:<15}", subsequent_indent=" " * 17)
    return "\n".join([*lines, "", *textwrap.wrap(_MORE, _width())])


def _show_help(name: str, *, brief: bool) -> NoReturn:
    """Print the help of a command. brief: of each option the first clause."""
    printed = _Like(sys.stdout)
    with redirect_stdout(printed), suppress(SystemExit):
        _parse(name, ["--help"], aloud=True, brief=brief)
    say(_wrapped(printed.getvalue()).rstrip("\n"), keep=_COLOURED)
    raise SystemExit(0)


def _refuse(name: str, words: Sequence[str]) -> NoReturn:
    """Print what tyro says of arguments that it does not take."""
    printed = _Like(sys.stderr)
    with redirect_stderr(printed), suppress(SystemExit):
        _parse(name, masked(words), aloud=True, brief=True)
    say(_wrapped(printed.getvalue()).rstrip("\n"), sys.stderr, keep=_COLOURED)
    raise SystemExit(2)


class _Like(io.StringIO):
    """Text for a stream: with colours if it is a terminal, and lines if it can show them."""

    encoding: Any = None

    def __init__(self, stream: TextIO | None) -> None:
        super().__init__()
        self.encoding = getattr(stream, "encoding", None)
        self._terminal = stream is not None and stream.isatty()

    def isatty(self) -> bool:
        return self._terminal


def _wrapped(text: str) -> str:
    """Help with the names of groups alone as titles, and paragraphs, which tyro writes on one line each, wrapped."""
    lines = []
    text = re.sub(r"(?<=╭─ )([a-z ]+) options (?=─)", lambda found: f"{found[1]} ────────", text)
    for line in text.split("\n"):
        lines += [line] if len(line) <= _width() or line[:1] in "╭│╰|+" else textwrap.wrap(line, _width())
    return "\n".join(lines)


def _width() -> int:
    return shutil.get_terminal_size().columns


def _parse(name: str, words: Sequence[str], *, aloud: bool = False, brief: bool = False) -> Any:
    text = inspect.getdoc(COMMANDS[name]) or ""
    return tyro.cli(
        COMMANDS[name],
        prog=f"fastkd {name}",
        description=text.split("\n\n")[0] if brief else text,
        args=words,
        config=(tyro.conf.FlagCreatePairsOff,),
        console_outputs=aloud,
        registry=_registry(brief=brief),
    )


def _registry(*, brief: bool) -> ConstructorRegistry:
    """How the fields of a command are shown in its help: in groups, and without uninformative defaults."""
    registry, inner = ConstructorRegistry(), False
    groups: dict[type, tuple[StructFieldSpec, ...]] = {}
    names = {command: name for name, command in COMMANDS.items()}

    def shown(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal inner
        if info.type in groups:
            return StructConstructorSpec(instantiate=dict, fields=groups[info.type])
        if inner or info.type not in names:
            return None
        inner = True
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            inner = False
        assert isinstance(spec, StructConstructorSpec)
        given = {one.name: _shown(one, brief=brief) for one in spec.fields}
        ordered = {g: [given[name] for name in some] for g, some in grouped(names[info.type], given).items()}
        main = sorted(ordered.pop(MAIN), key=lambda one: one.default is not MISSING_NONPROP)
        nested = []
        for group, members in ordered.items():
            if members:
                kind: Any = type(group, (), {})
                groups[kind] = tuple(members)
                shown_as: Any = Annotated[kind, tyro.conf.arg(name=group, help="")]
                nested.append(StructFieldSpec(f"{_GROUP}{group}", shown_as, MISSING_NONPROP))

        def instantiate(config: Any = None, print_config: Any = None, **values: Any) -> Any:
            """tyro gives neither option: `parsed` has read them."""
            for group in [one.name for one in nested]:
                values |= values.pop(group)
            return spec.instantiate(**values)

        return replace(spec, fields=(*main, *_own(), *nested), instantiate=instantiate)

    registry.struct_rule(shown)
    return registry


def _own() -> tuple[StructFieldSpec, StructFieldSpec]:
    """The options that all commands have; `parsed` reads them, tyro only shows them."""
    config: Any = Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]
    switch: Any = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]
    return (
        StructFieldSpec(CONFIG[2:], config, None, _CONFIG_HELP, _call_argname="config"),
        StructFieldSpec(PRINT_CONFIG[2:], switch, False, _PRINT_HELP, _call_argname="print_config"),
    )


def _shown(one: StructFieldSpec, *, brief: bool) -> StructFieldSpec:
    kind: Any = one.type
    options: dict[str, Any] = {}
    if one.default is None or one.default is False or one.default == ():
        options["help_behavior_hint"] = ""
    if get_origin(kind) in (Union, UnionType):
        (given,) = (option for option in get_args(kind) if option is not NoneType)
        options["metavar"] = _METAVARS[given] + "|None" * (one.default is not None)
    if get_origin(kind) is tuple and get_args(kind)[-1] is ... and get_args(kind)[0] in _METAVARS:
        options["metavar"] = f"{_METAVARS[get_args(kind)[0]]} ..."
    positional = get_origin(kind) is Annotated and tyro.conf.Positional in kind.__metadata__
    if not positional:
        options |= {"prefix_name": False, "name": spellings(one.name)[0].replace("-", "_")}
    if options:
        kind = Annotated[kind, tyro.conf.arg(**options)]
    return replace(one, type=kind, helptext=partial(_one_line, one.helptext, brief=brief, name=one.name))


def _one_line(text: str | Callable[[], str | None] | None, *, brief: bool, name: str) -> str:
    """A docstring as one line, or its first clause. tyro passes a callable that reads the source lazily."""
    found = " ".join(((text() if callable(text) else text) or "").split())
    if brief:
        first = re.match(r"(With [^:]*: )?.*?(?=[.:;] |\.?$)", found)
        return f"{first[0] if first else found}."
    others = [f"--{one}" for one in spellings(name)[1:]]
    return f"{found} Also {', '.join(others)}." if others else found
