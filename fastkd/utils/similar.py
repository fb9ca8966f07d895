"""What someone may have meant: names like the one that was given. Imports nothing heavy."""

import os
from collections.abc import Iterable
from difflib import SequenceMatcher
from pathlib import Path

_ALIKE = 0.7  # of SequenceMatcher's ratio, from which on two names are alike
_MOST = 2  # names in one hint


def similar(name: str, known: Iterable[str]) -> list[str]:
    """The known names that are most like this one, best first: with a few other letters, in other case, or longer."""
    plain = _plain(name)

    def likeness(other: str) -> float:
        ratio = SequenceMatcher(None, plain, _plain(other)).ratio()
        # batch for batch_tokens; not k, which is a part of many names
        part = len(plain) >= 4 and (_plain(other).startswith(plain) or plain in _plain(other).split("-"))
        return max(ratio, 0.9 if part else 0.0)

    found = sorted(((likeness(other), other) for other in dict.fromkeys(known)), key=lambda one: -one[0])
    best = found[0][0] if found else 0.0
    return [other for score, other in found[:_MOST] if score >= max(_ALIKE, best - 0.1)]


def did_you_mean(name: str, known: Iterable[str], *, prefix: str = "") -> str:
    """A question to put behind a sentence, " Did you mean X?"; empty if no known name is like this one. prefix: of each
    name."""
    found = [prefix + one for one in similar(name, known) if one != name]
    return f" Did you mean {' or '.join(found)}?" if found else ""


def similar_path(path: str) -> str | None:
    """The path with its first part that does not exist replaced by the one beside it that is most like it; None if the
    path exists, or nothing is like it."""
    if "://" in path or not path.strip() or "\0" in path or os.path.lexists(os.path.expanduser(path)):
        return None
    parts = Path(path).parts
    for i in range(len(parts)):
        folder = Path(*parts[:i]) if i else Path()
        if not os.path.lexists(Path(*parts[: i + 1]).expanduser()):
            try:
                names = os.listdir(folder.expanduser())
            except OSError:
                return None
            found = [Path(*parts[:i], name, *parts[i + 1 :]) for name in similar(parts[i], names)]
            return next((str(one) for one in found if os.path.lexists(one.expanduser())), None)
    return None


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")
