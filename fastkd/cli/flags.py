"""Names of settings in messages as the options that were typed."""

import re
from collections.abc import Mapping

from .options import options_of


def flags(command: str, typed: Mapping[str, str] | None = None) -> dict[str, str]:
    """The option of each setting of a command, as it was typed, if it was; positional arguments have none."""
    return {one.name: one.flags[0] for one in options_of(command) if not one.positional} | dict(typed or {})


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
