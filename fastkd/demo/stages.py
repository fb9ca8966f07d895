"""Stages of the demo, announced on stderr and timed, and the verification of the cache, which both tasks have."""

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..cache import CacheError, verify_cache
from ..cache.manifest import shard_index
from ..cache.verify import Report
from ..errors import ReportError
from ..utils.progress import Lenient


class Stages:
    """Announces and times stages."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = {}
        self._stream = Lenient(sys.stderr)

    @contextmanager
    def stage(self, name: str, description: str) -> Iterator[None]:
        """Announce and time a stage. Times of stages of the same name add up."""
        self.log(f"{name}: {description}")
        start = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def log(self, text: str) -> None:
        """Print a line, or several."""
        print(f"[{time.perf_counter() - self._start:4.0f} s] {text}", file=self._stream, flush=True)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage, and "all": since the start."""
        return self._seconds | {"all": time.perf_counter() - self._start}


def verify_before_training(cache: Path, stages: Stages) -> Report:
    """The report of `verify_cache`. Raises CacheError if it has problems."""
    with stages.stage("verify", "every byte of the cache against its hash"):
        found = verify_cache(cache, deep=True)
        if found.problems:
            raise CacheError(
                f"{cache}: {'; '.join(map(str, found.problems))}. Nothing was trained. Delete bad shards and "
                "manifest.parquet, and run the same command again: it captures only what is missing."
            )
    return found


def flip_a_bit(cache: Path, copy: Path) -> tuple[str, list[str]]:
    """Copy a cache and flip a bit in the middle of its second shard (or its only one).

    Returns which byte changed, and the problems that `fastkd verify` reports. Raises ReportError if there are none.
    """
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(cache, copy)
    shards = sorted(path for path in (copy / "shards").iterdir() if shard_index(f"shards/{path.name}") is not None)
    path = shards[min(1, len(shards) - 1)]
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle] ^= 1
    path.write_bytes(data)
    found = verify_cache(copy, deep=False)
    if found.ok:
        raise ReportError(f"{copy}: one of its bytes is wrong, but verify found no problem. Please report this bug.")
    return f"byte {middle:,} of {len(data):,} of {path.relative_to(copy.parent)}", [str(p) for p in found.problems]
