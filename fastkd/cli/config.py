"""Config files of the command line: `--config run.toml`, and the TOML that reproduces a command.

A file has the options of a command by their names, `steps = 100`, at the top or in the tables of their groups
(`[optimization]`), which say nothing more. `-` and `_` are the same. Paths are relative to the current folder, as they
are on the command line.
"""

import json
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from .. import __version__
from ..cache.errors import type_name
from ..utils.secrets import masked
from ..utils.similar import did_you_mean, similar_path
from .groups import GROUPS, MAIN, grouped, spellings
from .options import Option, UsageError, options_of

CONFIG_FILE = "config.toml"  # in the folder of a run, beside run.json
_YAML = (".yaml", ".yml")


def read_config(place: str, command: str) -> dict[str, list[str]]:
    """The words of each field that a config file of TOML or YAML has, as if they were typed. Raises UsageError."""
    document = _document(place)
    by_name = {word.replace("_", "-"): option for option in options_of(command) for word in _names(option)}
    found: dict[str, list[str]] = {}
    seen: dict[str, str] = {}
    for key, value in _entries(document, place, list(by_name)):
        option = by_name.get(key.replace("_", "-"))
        if option is None:
            hint = did_you_mean(key, [name.replace("-", "_") for name in by_name])
            raise UsageError(f"{place}: {key}: `fastkd {command}` has no such option.{hint}")
        if option.name in seen:
            raise UsageError(f"{place}: {key}: got it twice, also as {seen[option.name]}; expected it once.")
        seen[option.name] = key
        words = _words(option, value, f"{place}: {key}")
        if words is not None:
            found[option.name] = words
    return found


def config_text(command: str, values: Any) -> str:
    """TOML that reproduces a command: every setting with its value, by group; those that are None are left out.

    Values with credentials are left out as well, and named in a comment.
    """
    lines = [
        f"# fastkd {command} --config FILE",
        f"# Written by fastkd {__version__}. Options on the command line win over those here.",
    ]
    options = {option.name: option for option in options_of(command)}
    kept = [field.name for field in fields(values) if field.name in options]
    kept = [name for name in kept if name != "json" or options[name].count]  # how it prints is no part of a run
    groups = grouped(command, kept)
    for name in [one for one in groups[MAIN] if one in GROUPS]:  # TOML has no table and value of one name
        groups[MAIN].remove(name)
        groups[name].insert(0, name)
    for group, names in groups.items():
        if shown := [line for name in names for line in _assignment(options[name], getattr(values, name))]:
            lines += ["", *([f"[{group.replace(' ', '-')}]"] if group else []), *shown]
    return "\n".join(lines) + "\n"


def _document(place: str) -> Mapping[str, Any]:
    path = Path(place)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = similar_path(place)
        hint = f" Did you mean {beside}?" if beside else ""
        raise UsageError(
            f"--config: got {place}, which does not exist; expected a file of TOML or YAML.{hint}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config: got {place}, which cannot be read ({error}); expected TOML or YAML.") from error
    if path.suffix.lower() in _YAML:
        try:
            import yaml
        except ImportError as error:
            raise UsageError(f"--config: got {place}, for which PyYAML is missing: pip install pyyaml.") from error
        try:
            document = yaml.load(text, _without_duplicates(yaml))
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: of a date, or a long number
            raise UsageError(f"{place}: not YAML: {' '.join(str(error).split())}") from error
        document = {} if document is None else document
    else:
        try:
            document = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # a TOMLDecodeError, or of a long number
            raise UsageError(f"{place}: not TOML: {error}") from error
    if not isinstance(document, dict):
        raise UsageError(f"{place}: got {type_name(document)}; expected options and their values.")
    return document


def _without_duplicates(yaml: Any) -> Any:
    """The loader of plain values, that refuses a key which a table has twice, of which YAML would take the last."""

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML may be missing
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in getattr(node, "value", ()) if isinstance(key, yaml.ScalarNode)]
            for number, key in enumerate(keys):
                if key in keys[:number]:
                    raise yaml.constructor.ConstructorError(None, None, f"found {key!r} twice", node.start_mark)
            return super().construct_mapping(node, deep)

    return Loader


def _entries(document: Mapping[Any, Any], place: str, known: list[str]) -> Iterator[tuple[str, Any]]:
    """The options of a document, from the tables of groups too."""
    groups = {name.replace(" ", "-") for name in GROUPS if name}
    for key, value in document.items():
        if not isinstance(value, dict):
            yield str(key), value
        elif str(key).replace("_", "-").replace(" ", "-") in groups:
            for inner, one in value.items():
                if isinstance(one, dict):
                    raise UsageError(f"{place}: {key}.{inner}: got a table; expected a value.")
                yield str(inner), one
        else:
            hint = did_you_mean(str(key), [*sorted(groups), *known])
            raise UsageError(f"{place}: {key}: got a table; expected one of {', '.join(sorted(groups))}.{hint}")


def _names(option: Option) -> tuple[str, ...]:
    return (*spellings(option.name), option.name)


def _words(option: Option, value: Any, where: str) -> list[str] | None:
    """A value as it would be typed. None: the option is not typed at all."""
    if value is None:
        return None if option.default is None else ["None"]
    if option.count == 0:
        if not isinstance(value, bool):
            raise UsageError(f"{where}: got {value!r}; expected true or false.")
        return ["true" if value else "false"]
    several = isinstance(value, list)
    if several and option.count == 1:
        raise UsageError(f"{where}: got a list; expected one value.")
    if option.count not in (None, 1) and (not several or len(value) != option.count):
        raise UsageError(f"{where}: got {_said(value)}; expected a list of {option.count} values.")
    words = []
    for one in value if several else [value]:
        if isinstance(one, bool) or not isinstance(one, (str, int, float)):
            raise UsageError(f"{where}: got {_said(one)}; expected {_expected(option)}.")
        word = one if isinstance(one, str) else repr(one)
        option.check(word, where)
        words.append(word)
    return words


def _said(value: Any) -> str:
    """A value in a message. Lists of lists can be short in YAML, and too long for any message."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return f"a {type_name(value)}" if isinstance(value, (dict, set)) else repr(value)


def _expected(option: Option) -> str:
    if option.choices:
        return "one of " + ", ".join(option.choices)
    return "a number" if option.types <= {int, float} else "text"


def _assignment(option: Option, value: Any) -> list[str]:
    """The line of a setting; none for a value that needs none."""
    name = spellings(option.name)[0].replace("-", "_")
    if value is None and option.default is None:
        return []
    plain = _plain(value)
    if masked(plain) != plain:
        return [f"# {name}: left out, since it has credentials. Give it on the command line."]
    try:
        return [f"{name} = {_toml(plain)}"]
    except UnicodeEncodeError:
        return [f"# {name}: left out, since it is not Unicode. Give it on the command line."]


def _plain(value: Any) -> Any:
    """A value of the types that TOML has."""
    if isinstance(value, (tuple, list)):
        return [_plain(one) for one in value]
    if isinstance(value, Path):
        return str(value)
    return "None" if value is None else value


def _toml(value: Any) -> str:
    """A value as TOML. Strings are those of JSON, what is not printable escaped: TOML has no `\\xa0`."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        value.encode("utf-8")
        return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in json.dumps(value, ensure_ascii=False))
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else f"{'-' * (value < 0)}inf"
    return repr(value)
