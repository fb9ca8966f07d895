"""Checkpoints on disk: a folder each, there whole or not at all; tensors as safetensors, the rest as JSON.

    RUN/checkpoints/step-00000120/  model.safetensors  optimizer.safetensors  state.json

A checkpoint is written into a folder with a leading dot, every file and the folder synced, and renamed. state.json
holds the size and the sha256 of the other files, so that a damaged one is known for what it is.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import TrainError
from ..utils.atomic import remove_folder, write_folder

FORMAT, VERSION = "fastkd-checkpoint", 1
FOLDER = "checkpoints"
STATE = "state.json"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint. state: what was given to `write`."""

    folder: Path
    step: int
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Those written under a name. TrainError where they cannot be read."""
        path = self.folder / f"{name}.safetensors"
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise TrainError(f"{path}: cannot be read ({error}). Delete {self.folder}, and train again.") from error


def write(run: Path, step: int, tensors: Mapping[str, dict[str, Tensor]], state: Mapping[str, Any]) -> Path:
    """Write a checkpoint; one of this step that is there is replaced. Returns its folder.

    tensors: by name, on the CPU, none of which shares memory. state: what JSON can hold. Raises OSError or
    SafetensorError where it cannot be written.
    """
    final = run / FOLDER / f"step-{step:08d}"

    def fill(folder: Path) -> None:
        files = {}
        for name, some in tensors.items():
            path = folder / f"{name}.safetensors"
            save_file({key: tensor.contiguous() for key, tensor in some.items()}, path)
            files[path.name] = _identity(path)
        document = {"format": FORMAT, "version": VERSION, "step": step, "files": files, "state": dict(state)}
        (folder / STATE).write_text(json.dumps(document, allow_nan=False))

    write_folder(final, fill)
    return final


def newest(run: Path, say: Callable[[str], None] = lambda text: None) -> Checkpoint | None:
    """The newest whole checkpoint of a run; None where there is none of any kind. say: told of those that are damaged.

    Raises TrainError where all are damaged: to begin anew is not for this to decide.
    """
    problem = ""
    for step in sorted(steps_of(run), reverse=True):
        found = read(run, step)
        if isinstance(found, Checkpoint):
            return found
        problem = f"{run / FOLDER / f'step-{step:08d}'}: {found}"
        say(f"{problem}; an older checkpoint is taken.")
    if problem:
        raise TrainError(f"{problem}, and no other checkpoint is whole. Delete {run / FOLDER} to begin anew.")
    return None


def read(run: Path, step: int) -> Checkpoint | str:
    """A checkpoint, or what is wrong with it."""
    folder = run / FOLDER / f"step-{step:08d}"
    try:
        document = json.loads((folder / STATE).read_text())
    except (OSError, ValueError) as error:
        return f"{STATE} cannot be read ({error})"
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        return f"{STATE} is no checkpoint's"
    if document.get("version") != VERSION:
        raise TrainError(
            f"{folder}: found version {document.get('version')!r}, this fastkd reads {VERSION}; use the fastkd that "
            "wrote it, or train into another folder."
        )
    for name, expected in document["files"].items():
        try:
            if _identity(folder / name) != expected:
                return f"{name} is not what was written"
        except OSError as error:
            return f"{name} cannot be read ({error})"
    return Checkpoint(folder, step, document["state"])


def steps_of(run: Path) -> list[int]:
    """The steps of which there is a checkpoint, whole or damaged."""
    folder = run / FOLDER
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(found[1]) for name in names if (found := _NAME.fullmatch(name)))


def prune(run: Path, *, keep: int, best: int | None, last: int) -> None:
    """Remove all checkpoints but those of the last `keep` steps up to `last`, and of the best."""
    steps = steps_of(run)
    kept = [step for step in steps if step <= last][-keep:]
    for step in set(steps) - {best, *kept}:
        remove_folder(run / FOLDER / f"step-{step:08d}")


def clean(run: Path) -> None:
    """Remove what was being written, or removed, when a run ended."""
    for folder in (run, run / FOLDER):
        for left in folder.glob(".*.part"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def _identity(path: Path) -> list[Any]:
    """A file's size and hash."""
    with open(path, "rb") as file:
        return [os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()]
