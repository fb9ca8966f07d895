"""The reference of the command line, made of the commands' dataclasses and their docstrings."""

import dataclasses
import inspect
from pathlib import Path

import griffe

from fastkd.cli.commands import COMMANDS
from fastkd.cli.groups import MAIN, grouped
from fastkd.cli.options import Option, options_of

_TYPES = {int: "integer", float: "number", str: "text", Path: "path"}


def reference(search: Path) -> str:
    """A section for every command, with a list of its options by group.

    search: the folder of the package, in the layout in which it is installed.
    """
    package = griffe.load("fastkd", search_paths=[search], try_relative_path=False, resolve_aliases=False)
    parts = [""]
    for name, command in COMMANDS.items():
        parts += [f"## fastkd {name}\n", f"{inspect.getdoc(command)}\n"]
        options = {option.name: option for option in options_of(name)}
        for group, names in grouped(name, options).items():
            if group != MAIN and names:
                parts.append(f"*{group[0].upper()}{group[1:]}*\n")
            parts += [*(_item(command, options[one], package) for one in names), ""]
    return "\n".join(parts)


def _item(command: type, option: Option, package: griffe.Module) -> str:
    owner = next(base for base in command.__mro__ if option.name in inspect.get_annotations(base))
    attribute = package[f"{owner.__module__}.{owner.__qualname__}".removeprefix("fastkd.")][option.name]
    help_text = " ".join((attribute.docstring.value if attribute.docstring else "").split()).replace("<", "&lt;")
    said = ", ".join(f"`{choice}`" for choice in option.choices)
    if not said and option.count != 0:
        said = " or ".join(sorted(_TYPES[kind] for kind in option.types))
    if option.count is None or option.count > 1:
        said += " ..."
    default = option.default
    if default is dataclasses.MISSING:
        said += "; required"
    elif default not in (None, (), False, ""):
        said += f"; default `{' '.join(map(str, default)) if isinstance(default, tuple) else default}`"
    return f"- **`{option.shown}`**{f' ({said})' if said else ''}: {help_text}"
