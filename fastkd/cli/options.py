"""The options of a command, as they are typed: what was given, what is wrong with it, and the canonical arguments.

Runs before tyro, which gets every option once and in one spelling. So options that take several values may be repeated,
a config file can stand in for what was not typed, and errors can say what was meant.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from ..utils.similar import did_you_mean
from .commands import COMMANDS
from .groups import spellings

CONFIG, PRINT_CONFIG = "--config", "--print-config"
_OPTION = re.compile(r"--|-[^0-9.]")  # how an option begins; other words are values
_NUMBERS: dict[type, str] = {int: "an integer", float: "a number"}


class UsageError(Exception):
    """What was typed, or is in a config file, is not possible. The message is shown as it is."""


class HelpWanted(Exception):
    """Help was asked for: brief by -h, whole by --help."""

    def __init__(self, *, brief: bool) -> None:
        super().__init__()
        self.brief = brief


@dataclass(frozen=True)
class Option:
    """An option of a command. flags: its spellings, the one of the help first. positional: it is a word without an
    option; `--cache CACHE` is taken too, as other commands have it.

    count: values that it takes; 0: it is a switch, None: any number of them. types: of a value. choices: that a value
    has to be one of, unless there are none. optional: whether None is a value.
    """

    name: str
    flags: tuple[str, ...]
    positional: bool
    count: int | None
    types: frozenset[type]
    choices: tuple[str, ...]
    optional: bool
    default: Any

    @property
    def shown(self) -> str:
        return self.name.upper() if self.positional else self.flags[0]

    def check(self, word: str, shown: str) -> None:
        """Raise UsageError, which calls the option `shown`, for a value that cannot be one."""
        if self.optional and word == "None":
            return
        if self.choices and word not in self.choices:
            expected = ", ".join(self.choices)
            raise UsageError(f"{shown}: got {word!r}; expected one of {expected}.{did_you_mean(word, self.choices)}")
        kind: Any = {frozenset({int}): int, frozenset({float}): float, frozenset({int, float}): float}.get(self.types)
        if kind is not None:
            try:
                kind(word)
            except ValueError:
                raise UsageError(f"{shown}: got {word!r}; expected {_NUMBERS[kind]}.") from None


@dataclass
class Given:
    """What was given for a command: words for each field (of a switch, "true" or "false"), and the option that was
    typed for it."""

    values: dict[str, list[str]] = field(default_factory=dict)
    typed: dict[str, str] = field(default_factory=dict)
    config: str | None = None
    print_config: bool = False


@cache
def options_of(command: str) -> tuple[Option, ...]:
    """The options of a command, in the order of its fields."""
    kind = COMMANDS[command]
    hints = get_type_hints(kind, include_extras=True)
    found = []
    for one in fields(kind):
        marks = getattr(hints[one.name], "__metadata__", ())
        if tyro.conf.Suppress in marks:
            continue
        flags, positional = tuple("--" + word for word in spellings(one.name)), tyro.conf.Positional in marks
        found.append(Option(one.name, flags, positional, *_values(hints[one.name]), _default(one)))
    return tuple(found)


def _default(one: Any) -> Any:
    return one.default if one.default_factory is MISSING else one.default_factory()


def _values(kind: Any) -> tuple[int | None, frozenset[type], tuple[str, ...], bool]:
    """How many values of which types, their choices, and whether None is one."""
    if get_origin(kind) is Annotated:
        return _values(get_args(kind)[0])
    if kind is bool:
        return 0, frozenset({bool}), (), False
    if get_origin(kind) is Literal:
        return 1, frozenset({str}), tuple(map(str, get_args(kind))), False
    if get_origin(kind) in (Union, UnionType):
        parts = [_values(part) for part in get_args(kind) if part is not NoneType]
        types = frozenset(one for part in parts for one in part[1])
        return parts[0][0], types, tuple(c for part in parts for c in part[2]), NoneType in get_args(kind)
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        _, types, choices, optional = _values(inner[0])
        return None if inner[-1] is ... else len(inner), types, choices, optional
    return 1, frozenset({kind}), (), False


def scan(command: str, args: Sequence[str]) -> Given:
    """What is given for a command. Raises UsageError, and HelpWanted."""
    options = options_of(command)
    by_flag = {flag: (option, False) for option in options for flag in option.flags}
    by_flag |= {f"--no-{flag[2:]}": (o, True) for o in options if o.count == 0 for flag in o.flags}
    given, words, i = Given(), [], 0
    for word in args:
        if word in ("-h", "--help"):
            raise HelpWanted(brief=word == "-h")
    while i < len(args):
        flag, equals, inline = args[i].partition("=")
        i += 1
        if not _OPTION.match(flag):
            words.append(args[i - 1])
            continue
        flag = flag.replace("_", "-")
        if flag == PRINT_CONFIG and not equals:
            given.print_config = True
            continue
        option, negated = by_flag.get(flag, (None, False))
        if option is None and flag != CONFIG:
            raise UsageError(_unknown(command, flag, by_flag))
        count = 1 if option is None else option.count
        if count == 0:
            assert option is not None
            if equals:
                raise UsageError(f"{flag}: got the value {inline!r}; expected none.")
            given.values[option.name] = ["false" if negated else "true"]
            given.typed[option.name] = flag
            continue
        found = [inline] if equals else []
        while not equals and i < len(args) and (count is None or len(found) < count) and not _OPTION.match(args[i]):
            found.append(args[i])
            i += 1
        if count is not None and len(found) < count:
            got = f"{len(found)} values" if found else "no value"
            expected = "one" if count == 1 else str(count)
            raise UsageError(f"{flag}: got {got}; expected {expected}.")
        if option is None:
            given.config = found[0]
            continue
        for word in found:
            option.check(word, flag)
        # the last value replaces the ones before it; several values add up
        before = given.values.get(option.name, []) if count is None else []
        given.values[option.name] = before + found
        given.typed[option.name] = flag
    _assign(command, words, options, given)
    return given


def _assign(command: str, words: list[str], options: Iterable[Option], given: Given) -> None:
    """Give positional arguments their words, in order; one that takes several gets what the ones after it leave."""
    positional = [option for option in options if option.positional and option.name not in given.values]
    rest = list(words)
    for i, option in enumerate(positional):
        after = len(positional) - i - 1
        count = option.count if option.count is not None else max(len(rest) - after, 0)
        if taken := rest[:count]:
            for word in taken:
                option.check(word, option.shown)
            given.values[option.name] = taken
        rest = rest[count:]
    if rest:
        names = "".join(f" {option.shown}" for option in positional)
        raise UsageError(
            f"{rest[0]}: got a word that belongs to no option; expected `fastkd {command}{names}` and options, "
            "--NAME VALUE."
        )


def _unknown(command: str, flag: str, known: Iterable[str]) -> str:
    names = [one[2:] for one in (*known, CONFIG, PRINT_CONFIG)]
    hint = did_you_mean(flag.lstrip("-"), names, prefix="--")
    if not hint:
        others = [n for n in COMMANDS if n != command and any(flag in o.flags for o in options_of(n))]
        hint = f" It is one of {' and '.join(f'`fastkd {name}`' for name in others[:2])}." if others else ""
    return f"{flag}: `fastkd {command}` has no such option.{hint} `fastkd {command} --help` lists all."


def arguments(command: str, values: Mapping[str, Sequence[str]]) -> list[str]:
    """The arguments that tyro parses: positional ones first, each option once."""
    first, others = [], []
    for option in options_of(command):
        if option.name not in values:
            continue
        words = list(values[option.name])
        if option.positional:
            first += words
        elif option.count == 0:
            if (words == ["true"]) != option.default:
                others.append(option.flags[0] if words == ["true"] else f"--no-{option.flags[0][2:]}")
        elif option.count == 1:
            others.append(f"{option.flags[0]}={words[0]}")
        else:
            others += [option.flags[0], *words]
    return [*first, *others]
