"""Results that are stored together with the inputs they depend on, and reused as long as the inputs are the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..utils.atomic import remove_folder, write_text

Json = dict[str, Any]
INPUTS, RESULT = "of", "found"  # keys in the file
FOLDER_INPUTS = "made.json"  # in a complete folder


def load_result(path: Path, inputs: Json) -> Json | None:
    """The stored result; None if there is none, it is of other inputs, or the file cannot be parsed."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    same = isinstance(stored, dict) and stored.get(INPUTS) == json.loads(json.dumps(inputs, default=str))
    return stored[RESULT] if same and isinstance(stored.get(RESULT), dict) else None


def save_result(path: Path, inputs: Json, result: Json) -> Json:
    """Store a result with its inputs. Returns it as `load_result` will."""
    stored: Json = write_json(path, {INPUTS: inputs, RESULT: result})[RESULT]
    return stored


def cached_result(path: Path, inputs: Json, compute: Callable[[], Json]) -> Json:
    """The stored result, or else a new one, which is stored."""
    found = load_result(path, inputs)
    return save_result(path, inputs, compute()) if found is None else found


def make_folder(folder: Path, inputs: Json, log: Callable[[str], object], make: Callable[[], object]) -> None:
    """Call `make`, which fills a folder, unless it is complete with the same inputs.

    A complete folder of other inputs is removed before; an incomplete one stays as it is, so that `make` can resume.
    """
    if load_result(folder / FOLDER_INPUTS, inputs) is not None:
        log(f"{folder} is reused")
        return
    if (folder / FOLDER_INPUTS).exists():
        remove_folder(folder)
    make()
    save_result(folder / FOLDER_INPUTS, inputs, {})


def write_json(path: Path, value: Json) -> Json:
    """Write JSON atomically. Returns the value as it will be read: tuples as lists, paths as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=1, allow_nan=False, default=str)
    write_text(path, text + "\n")
    found: Json = json.loads(text)
    return found
