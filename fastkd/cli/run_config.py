"""config.toml in the folder of a run: the options of a command that reproduce it, for `--config`."""

import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..settings import LiveSettings, RolloutSettings
from ..utils.atomic import drop_parts, read_sealed, write_text
from .commands import Generations, Mutual, Sweep, Train
from .config import CONFIG_FILE, config_text

# for each command, what its folder has once it has begun
_WRITTEN: dict[type, tuple[str, ...]] = {
    Train: ("run.json",),
    Mutual: ("run.json",),
    Sweep: ("sweep.json", "auto.json"),
    Generations: ("generations.json",),
}
# runs within it that `fastkd train` can make
_WITHIN: dict[type, tuple[str, ...]] = {Train: ("control", "without_features"), Sweep: ("*/seed=*",)}


def leave_config(name: str, command: Any) -> None:
    """Write the options of a command into the folder that it has written, if it is one of a run, and those of its arms
    into theirs."""
    written = _WRITTEN.get(type(command), ())
    folder = Path(getattr(command, "out", None) or ".")
    if os.environ.get("RANK", "0") != "0" or not any((folder / one).is_file() for one in written):
        return
    _write(folder, config_text(name, command))
    for arm in _arms(command, folder):
        _write(arm.out, config_text("train", arm))


def _write(folder: Path, text: str) -> None:
    path = folder / CONFIG_FILE
    if not path.is_file() or path.read_bytes() != text.encode():
        drop_parts(path)
        write_text(path, text)


def _arms(command: Any, folder: Path) -> Iterator[Train]:
    """The command `fastkd train` of each run within a folder, whose run.json has its settings."""
    from ..train.live_inputs import is_inside

    if type(command) not in _WITHIN:
        return
    known = {one.name for one in fields(Train)}
    kept = {name: getattr(command, name) for name in known if hasattr(command, name)}
    data = kept.get("data") or ()
    kept |= {"data": (data,) if isinstance(data, str) else data, "control": False, "stop_if_worse": False}
    # an arm is not uploaded in the student's place, and continues no sequences itself
    kept |= {"push": None, "push_private": False} | vars(RolloutSettings())
    if kept["cache"]:  # a teacher beside it had rollouts to score
        kept |= {"teacher": None} | vars(LiveSettings())
    elif is_inside(kept["teacher"]):  # labels alone need none
        kept["teacher"] = None
    for pattern in _WITHIN[type(command)]:
        for path in sorted(folder.glob(f"{pattern}/run.json")):
            try:
                settings = dict(read_sealed(path)["settings"])
            except (ValueError, KeyError, TypeError, RecursionError):  # damaged: the commands say so
                continue
            # an earlier version may have had other settings
            yield Train(**{**kept, **{n: value for n, value in settings.items() if n in known}, "out": path.parent})
