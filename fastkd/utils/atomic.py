"""Atomic writing: a file or a folder is on disk complete, or not at all. And the lock of a folder."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import TrainError, WorkRemains
from .secrets import masked

_RECOVERABLE = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EINTR, errno.EAGAIN, errno.ENOMEM, errno.EMFILE,
    errno.ENFILE, errno.ETIMEDOUT,
)  # fmt: skip
_SHA256 = "sha256"  # of a JSON document: the name of its hash
PART = ".part"
"""How the name of a temporary file or folder ends; it begins with a dot."""
_REPLACED = f".before{PART}"


def lock(run: Path) -> int:
    """Lock a folder against other training processes, until `os.close` of the returned descriptor or the process's end.

    Raises TrainError if another process holds the lock. On a file system without locks, nothing is locked.
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


def disk_is_full(error: BaseException | None) -> bool:
    """Whether a full disk, or an exhausted quota, is the cause of an error; libraries name it by its text alone."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if re.search(r"(?i)no space left on device|quota exceeded", str(error)):
            return True
        error = error.__cause__
    return False


@contextmanager
def writing(where: Path, what: str = "") -> Iterator[None]:
    """Errors while files are written below a folder, as one sentence: WorkRemains if the same call may succeed later,
    as after a full disk; otherwise TrainError, as for a folder that was removed meanwhile."""
    try:
        yield
    except OSError as error:
        failed = f"{what} cannot be written" if what else "a file cannot be written or read"
        problem = f"{where}: {failed} ({error})"
        # no file name and ENOENT: of tempfile, which finds no folder that it can write to
        if error.errno in (None, *_RECOVERABLE) or (error.errno == errno.ENOENT and error.filename is None):
            raise WorkRemains(
                f"{problem}. Finished work is kept: free disk space if there is none, and run the same command again "
                "to resume."
            ) from error
        removed = " It was removed while it was written to." if error.errno in (errno.ENOENT, errno.ESTALE) else ""
        raise TrainError(f"{problem}.{removed} Check the folder and its permissions, and run it again.") from error


def check_place(final: Path, name: str, error: type[Exception]) -> None:
    """Raise `error` if a file or folder cannot be made, or a folder be written, as it or something above it is no
    folder, or not writable. name: of the setting that says where."""
    if final.is_dir():
        if not os.access(final, os.W_OK | os.X_OK):
            raise error(f"{name}: got {final}, which is not writable; expected a folder that is.")
        return
    above = next(path for path in final.absolute().parents if os.path.lexists(path))
    if not above.is_dir():
        raise error(f"{name}: got {final}, but {above} is no folder; expected a place in a folder.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise error(f"{name}: got {final}, but {above} is not writable; expected a folder that is.")


def write_file(final: Path, write: Callable[[Path], object], *, sync: bool = True) -> None:
    """Create or replace a file. `write` is given the temporary path to write to; sync: survive a power failure."""
    # processes that write the same file at the same time do not share a temporary one
    temporary = final.with_name(f".{final.name}.{os.getpid()}{PART}")
    try:
        write(temporary)
        if sync:
            _sync(temporary)
        os.replace(temporary, final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync:
        _sync(final.parent)


def write_text(final: Path, text: str, *, sync: bool = True) -> None:
    write_file(final, lambda path: path.write_text(text, encoding="utf-8"), sync=sync)


def write_json(final: Path, document: Any, *, indent: int | None = 1) -> None:
    """Create or replace a JSON file. Credentials in its texts are masked; an object is `sealed`."""
    document = masked(document)
    document = sealed(document) if isinstance(document, dict) else document
    write_text(final, json.dumps(document, indent=indent, allow_nan=False) + "\n")


def read_sealed(path: Path) -> Any:
    """A JSON document as it was given to `write_json`. Raises OSError, ValueError (also if it has changed since) and
    RecursionError."""
    return unsealed(json.loads(path.read_text(encoding="utf-8")))


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """A document as JSON returns it, with a sha256 of its contents, so that `unsealed` notices a changed bit."""
    plain: dict[str, Any] = json.loads(json.dumps({n: value for n, value in document.items() if n != _SHA256}))
    return plain | {_SHA256: _digest(plain)}


def unsealed(document: Any) -> Any:
    """The document without its sha256. Raises ValueError if it has one and is not what was `sealed`."""
    if not isinstance(document, dict) or _SHA256 not in document:
        return document
    plain = {name: value for name, value in document.items() if name != _SHA256}
    if document[_SHA256] != _digest(plain):
        raise ValueError("it has changed since it was written")
    return plain


def _digest(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def write_folder(final: Path, fill: Callable[[Path], object]) -> None:
    """Create or replace a folder. `fill` is given the empty temporary folder to write into."""
    try:
        fill(start_folder(final))
        commit_folder(final)
    except BaseException:
        drop_folder(final)
        raise


def start_folder(final: Path) -> Path:
    """An empty temporary folder, which `commit_folder` gives its final name and `drop_folder` removes."""
    temporary = temporary_folder(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    return temporary


def temporary_folder(final: Path) -> Path:
    """Where the files of a folder are written before they are complete."""
    return final.with_name(f".{final.name}{PART}")


def commit_folder(final: Path) -> None:
    """Sync a temporary folder to disk and give it its final name, replacing a folder of that name. If the process is
    killed meanwhile, one of both is there once `clean` was called."""
    temporary = temporary_folder(final)
    for path in temporary.rglob("*"):
        _sync(path)
    _sync(temporary)
    before = _replaced(final)
    if before.exists():
        shutil.rmtree(before)
    if final.exists():
        os.rename(final, before)
    os.rename(temporary, final)
    # otherwise a power failure could undo the rename
    _sync(final.parent)
    if before.exists():
        shutil.rmtree(before)


def _replaced(final: Path) -> Path:
    """Where a folder is while another one takes its place."""
    return final.with_name(f".{final.name}{_REPLACED}")


def clean(folder: Path) -> None:
    """Remove the temporary files and folders in a folder that an interrupted process left. A folder that was about to
    be replaced gets its name back."""
    for path in folder.glob(f".*{_REPLACED}"):
        final = path.with_name(path.name[1:].removesuffix(_REPLACED))
        if not final.exists():
            os.rename(path, final)
    for path in folder.glob(f".*{PART}"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def drop_parts(final: Path) -> None:
    """Remove the temporary files that killed processes left of a file which no other process writes now."""
    for path in final.parent.glob(f".{final.name}.*{PART}"):
        path.unlink(missing_ok=True)


def drop_folder(final: Path) -> None:
    """Remove a temporary folder, if there is one: on a full disk, incomplete files are the last to keep."""
    shutil.rmtree(temporary_folder(final), ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder, if it exists. If the process is killed meanwhile, no incomplete folder of this name is left."""
    if not folder.exists():
        return
    going = folder.with_name(f".{folder.name}.gone{PART}")
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
