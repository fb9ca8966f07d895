"""config.toml in the folder of a run: the options of the command that wrote it, for `--config`."""

import os
from pathlib import Path
from typing import Any

from ..utils.atomic import write_text
from .commands import Generations, Mutual, Sweep, Train
from .config import CONFIG_FILE, config_text

# for each command, what its folder has once it has begun
_WRITTEN: dict[type, tuple[str, ...]] = {
    Train: ("run.json",),
    Mutual: ("run.json",),
    Sweep: ("sweep.json", "auto.json"),
    Generations: ("generations.json",),
}


def leave_config(name: str, command: Any) -> None:
    """Write the options of a command into the folder that it has written, if it is one of a run."""
    written = _WRITTEN.get(type(command), ())
    folder = Path(getattr(command, "out", None) or ".")
    if os.environ.get("RANK", "0") == "0" and any((folder / one).is_file() for one in written):
        path, text = folder / CONFIG_FILE, config_text(name, command)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
