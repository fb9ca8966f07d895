"""sha256 of files, cached in the user's cache folder by path, size, inode and modification times.

A worker that restarts on a terabyte of data, or with a large teacher, does not hash it again.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from .atomic import write_text
from .progress import counting

SETTLED = 2.0
"""Seconds without changes before the hash of a file is cached. Of two writes within one tick of the file system's clock
(up to two seconds), the second does not change the modification time."""
_BLOCK = 2**22  # bytes hashed at a time


def file_sha256(path: str | Path, on_bytes: Callable[[int], object] | None = None) -> tuple[str, int]:
    """sha256 of a file's contents, in hexadecimal, and its size in bytes.

    A cached hash of a file with the same path, size, inode and modification times is used. on_bytes is called with the
    number of bytes processed. Raises OSError if the file cannot be read.
    """
    path = Path(path)
    with open(path, "rb") as file:
        before = os.fstat(file.fileno())
        known = _entry(path, before)
        if (found := _recalled(known)) is not None:
            if on_bytes is not None:
                on_bytes(before.st_size)
            return found, before.st_size
        digest, size = hashlib.sha256(), 0
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
            if on_bytes is not None:
                on_bytes(len(block))
        after = os.fstat(file.fileno())
    settled = time.time() - max(after.st_mtime, after.st_ctime) >= SETTLED
    if settled and _entry(path, after) == known and size == after.st_size:
        _remember(known, digest.hexdigest())
    return digest.hexdigest(), size


def files_sha256(paths: Iterable[Path], *, progress: bool = False) -> list[tuple[str, int]]:
    """`file_sha256` of each file. progress: show a progress bar on stderr."""
    paths = list(paths)
    total = sum(path.stat().st_size for path in paths)
    with counting(total, "byte", "fingerprint", shown=progress) as bar:
        return [file_sha256(path, bar.add) for path in paths]


def cache_folder() -> Path:
    """Folder of cached hashes: $XDG_CACHE_HOME/fastkd, or ~/.cache/fastkd."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    # the XDG specification says to ignore relative paths
    return (Path(home) if os.path.isabs(home) else Path("~/.cache").expanduser()) / "fastkd"


def _entry(path: Path, stat: os.stat_result) -> tuple[str, str]:
    """File name of the cache entry, and the identity line that the entry must contain."""
    identity = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_dev, stat.st_ino]
    text = json.dumps(identity)
    return hashlib.sha256(text.encode()).hexdigest(), text


def _recalled(entry: tuple[str, str]) -> str | None:
    name, identity = entry
    try:
        found = re.fullmatch(r"(.*)\n([0-9a-f]{64})\n", (cache_folder() / "sha256" / name).read_text())
    except (OSError, ValueError, RuntimeError):  # RuntimeError: no home folder
        return None
    return found[2] if found and found[1] == identity else None


def _remember(entry: tuple[str, str], digest: str) -> None:
    """Cache a hash. If that fails, it is computed again next time."""
    name, identity = entry
    with suppress(OSError, RuntimeError):
        folder = cache_folder() / "sha256"
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / name, f"{identity}\n{digest}\n", sync=False)
