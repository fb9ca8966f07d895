"""Griffe extension: parameters that a docstring explains in lines `name: text` become a list of parameters.

fastkd's docstrings explain parameters after the summary, in a paragraph of lines "name: text" or "one, other: text",
whose further lines are indented. The reference shows them as a table, with the types and defaults of the signature.
"""

import re
from typing import Any

import griffe

_WORDS = r"\*{0,2}\w+(?:, \*{0,2}\w+)*"


def sections(text: str, names: set[str], title: str = "Args") -> str:
    """The docstring with a Google-style section for each paragraph that explains parameters.

    names: the parameters of the function or of the class's constructor, or the fields of a dataclass. title: of the
        section.
    """
    found = []
    for paragraph in re.split(r"\n{2,}", text):
        before, entries, after = _entries(paragraph, names)
        found += [part for part in (before, _section(entries, title) if entries else "", after) if part]
    return "\n\n".join(found)


def _entries(paragraph: str, names: set[str]) -> tuple[str, list[tuple[list[str], str]], str]:
    """What the paragraph says of each group of names, and what comes before and after."""
    before: list[str] = []
    entries: list[tuple[list[str], str]] = []
    lines = paragraph.split("\n")
    for number, line in enumerate(lines):
        start = re.match(rf"({_WORDS})( `\[[^:]*)?: (.*)", line)
        if start and (entries or _known(start[1], names)):  # further ones may be inherited
            shape, said = (start[2] or "").strip(), start[3]
            entries += _split(start[1], f"{shape}. {said[:1].upper()}{said[1:]}" if shape else said, names)
        elif entries and line[:1].isupper() and lines[number - 1].endswith("."):  # a sentence about all of it
            return "\n".join(before), entries, "\n".join(lines[number:])
        elif entries:
            # a further line may begin another explanation in its middle
            last, said = entries.pop()
            entries += _split(", ".join(last), f"{said} {line.strip()}", names)
        else:
            before.append(line)
    return "\n".join(before), entries, ""


def _split(group: str, said: str, names: set[str]) -> list[tuple[list[str], str]]:
    """`said`, and what follows in it of other parameters: "of the worker. threads: for writing"."""
    for next_one in re.finditer(rf"(?<=[.;)] )({_WORDS})( `\[[^`]*`[^`:;.]*)?: ", said):
        if _known(next_one[1], names):
            shape = f"{next_one[2].strip()}. " if next_one[2] else ""
            after = f"{shape}{said[next_one.end() :]}"
            return [(group.split(", "), said[: next_one.start()].rstrip(" ;")), *_split(next_one[1], after, names)]
    return [(group.split(", "), said)]


def _known(group: str, names: set[str]) -> bool:
    return {name.lstrip("*") for name in group.split(", ")} <= names


def _section(entries: list[tuple[list[str], str]], title: str) -> str:
    lines = [f"{title}:"]
    for group, said in entries:
        first, *others = group
        lines.append(f"    {first}: {said[:1].upper()}{said[1:]}" if said[:1] != "`" else f"    {first}: {said}")
        lines += [f"    {other}: See {first}." for other in others]
    return "\n".join(lines)


class Parameters(griffe.Extension):
    """Rewrites the docstrings of functions and classes."""

    def on_function_instance(self, *, func: griffe.Function, **_: Any) -> None:
        if func.docstring is not None:
            func.docstring.value = sections(func.docstring.value, {parameter.name for parameter in func.parameters})

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        made = cls.members.get("__init__")
        given = {parameter.name for parameter in made.parameters} if isinstance(made, griffe.Function) else set()
        if cls.docstring is not None:
            text = cls.docstring.value
            as_given = sections(text, given, "Args")
            cls.docstring.value = as_given if as_given != text else sections(text, set(cls.members), "Attributes")
