"""What is made once: beside a result lies what it was made of, and only where that is the same it is taken again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..utils.atomic import write_text

Json = dict[str, Any]


def there(path: Path, of: Json) -> Json | None:
    """What `keep` kept there, where it was made of the same; else None, also where the file cannot be read as such."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # of another version, or by another hand: it is made anew
        return None
    same = isinstance(found, dict) and found.get("of") == plain(of) and isinstance(found.get("found"), dict)
    return found["found"] if same else None


def keep(path: Path, of: Json, found: Json) -> Json:
    """Write a result and what it was made of, whole or not at all; the result as JSON holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"of": of, "found": found}, indent=1, allow_nan=False, default=str) + "\n")
    return plain(found)


def once(path: Path, of: Json, make: Callable[[], Json]) -> Json:
    """The result that is there, or a new one."""
    found = there(path, of)
    return keep(path, of, make()) if found is None else found


def plain(value: Json) -> Json:
    """As it comes back from a file: tuples are lists, paths text."""
    found: Json = json.loads(json.dumps(value, default=str))
    return found
