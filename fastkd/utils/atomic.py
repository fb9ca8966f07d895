"""Files and folders that are on disk whole or not at all, and the lock of a folder."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from ..errors import TrainError


def lock(run: Path) -> int:
    """Keep others from training into a folder, until what is returned is closed (os.close), or this process ends.

    Raises TrainError where another does already. Where the file system has no locks, there is none.
    """
    folder = os.open(run, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(folder)
        raise TrainError(
            f"{run}: another process trains into it. Wait for it, or train into another folder."
        ) from error
    except OSError:
        pass
    return folder


def write_folder(final: Path, fill: Callable[[Path], object]) -> None:
    """Have a folder that `fill` fills, whole and on disk; one that is there is replaced."""
    temporary = final.with_name(f".{final.name}.part")
    final.parent.mkdir(parents=True, exist_ok=True)
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    try:
        fill(temporary)
        for path in temporary.rglob("*"):
            _sync(path)
        _sync(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # of a full disk it is the last that should be kept
        raise
    remove_folder(final)
    os.rename(temporary, final)
    # else a power cut could take the new name back
    _sync(final.parent)


def write_text(final: Path, text: str) -> None:
    """Have a file of this text, whole and on disk; one that is there is replaced."""
    temporary = final.with_name(f".{final.name}.part")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, final)
    _sync(final.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder, if it is there; a kill meanwhile leaves none of its name that is not whole."""
    if not folder.exists():
        return
    going = folder.with_name(f".{folder.name}.gone.part")
    if going.exists():
        shutil.rmtree(going)
    os.rename(folder, going)
    shutil.rmtree(going)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
