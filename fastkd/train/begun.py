"""What a run was begun with, where a default depends on the data or has changed: it is resumed with the same."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ..data.packing import HELD_OUT
from ..errors import TrainError
from ..settings import LiveSettings
from .checkpoint import Checkpoint, read, steps_of
from .result import RUN


def begun_with(folders: Iterable[Path]) -> Mapping[str, Any]:
    """`batch_tokens`, and without a cache `held_out` and the `context` of what is packed, of the first of these run
    folders in which a training was begun; empty if there is none."""
    for folder in folders:
        for step in reversed(steps_of(folder)):
            found = _state(folder, step)
            if found is not None:
                settings, source = _table(found["settings"]), _table(_table(found["loader"]).get("fingerprint"))
                return _known(settings, source)
        if (run := _document(folder / RUN)) is not None:
            settings, source = _table(run.get("settings")), _table(_table(run.get("live")).get("identity"))
            return _known(settings, source)
    return {}


Live = TypeVar("Live", bound=LiveSettings)


def continued(live: Live, begun: Mapping[str, Any]) -> Live:
    """The settings of data with the held-out fraction of a run from before more was held out of small data, and with
    the context that a run was begun with."""
    kept = {}
    if live.held_out is None and begun.get("held_out") in (0.0, HELD_OUT):
        kept["held_out"] = begun["held_out"]
    if live.context is None and live.packing == "pack" and "context" in begun:
        kept["context"] = begun["context"]
    return replace(live, **kept) if kept else live


def _known(settings: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    found = {"batch_tokens": settings.get("batch_tokens"), "held_out": source.get("held_out")}
    if source.get("packing") == "pack":
        found["context"] = source.get("context")
    return {name: value for name, value in found.items() if value is not None}


def _table(found: Any) -> Mapping[str, Any]:
    """A part of a document; empty if it is none, as in a damaged file."""
    return found if isinstance(found, dict) else {}


def _state(folder: Path, step: int) -> Mapping[str, Any] | None:
    """What a checkpoint says of its run; None if it cannot be read. Whether it is whole is found when it is loaded."""
    try:
        found = read(folder, step, verify=False)
    except TrainError:
        return None
    if not isinstance(found, Checkpoint) or not {"settings", "loader"} <= found.state.keys():
        return None
    return found.state


def _document(path: Path) -> Mapping[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
