"""sha256 of files, computed once: what a file hashed to is remembered by its identity, in the user's cache folder.

A worker that starts again on a terabyte of data, or on a large teacher, then hashes nothing.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tqdm import tqdm

SETTLED = 2.0
"""Seconds for which a file must not have changed before its hash is kept. Of two writes within one tick of the file
system's clock (on some, two seconds) the second leaves no trace in the times."""
_BLOCK = 2**22  # bytes hashed at a time


def file_sha256(path: str | Path, on_bytes: Callable[[int], object] | None = None) -> tuple[str, int]:
    """sha256 of a file's contents, in hexadecimal, and its size in bytes.

    What is known of a file of this path, size, inode and times of change is not computed again. on_bytes is told of
    the bytes that are done. Raises OSError where the file cannot be read.
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
    """`file_sha256` of each; progress: a bar on stderr."""
    paths = list(paths)
    total = sum(path.stat().st_size for path in paths)
    with tqdm(
        total=total, desc="fingerprint", unit="B", unit_scale=True, unit_divisor=1024, disable=not progress
    ) as bar:
        return [file_sha256(path, bar.update) for path in paths]


def cache_folder() -> Path:
    """Where hashes are kept: $XDG_CACHE_HOME/fastkd, or ~/.cache/fastkd."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    # a relative one is to be ignored, says who defined the variable
    return (Path(home) if os.path.isabs(home) else Path("~/.cache").expanduser()) / "fastkd"


def _entry(path: Path, stat: os.stat_result) -> tuple[str, str]:
    """The name of a file's entry in the cache, and what it must hold, less the hash."""
    identity = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_dev, stat.st_ino]
    text = json.dumps(identity)
    return hashlib.sha256(text.encode()).hexdigest(), text


def _recalled(entry: tuple[str, str]) -> str | None:
    name, identity = entry
    try:
        known, digest, end = (cache_folder() / "sha256" / name).read_text().split("\n")
    except (OSError, ValueError, RuntimeError):  # RuntimeError: there is no home
        return None
    whole = known == identity and len(digest) == 64 and not set(digest) - set("0123456789abcdef") and not end
    return digest if whole else None


def _remember(entry: tuple[str, str], digest: str) -> None:
    """Keep a hash. Where that cannot be done, it is computed again next time."""
    name, identity = entry
    try:
        folder = cache_folder() / "sha256"
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".", suffix=".part")
    except (OSError, RuntimeError):
        return
    try:
        with os.fdopen(handle, "w") as file:
            file.write(f"{identity}\n{digest}\n")
        os.replace(temporary, folder / name)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
