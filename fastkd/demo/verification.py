"""Verification of the cache: before training, and of a copy with a flipped bit."""

import shutil
from pathlib import Path

from ..cache import CacheError, verify_cache
from ..cache.manifest import shard_index
from ..cache.verify import Report
from ..errors import ReportError
from .stages import Stages


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


def copy_with_flipped_bit(cache: Path, copy: Path) -> str:
    """Copy a cache and flip a bit in the middle of its second shard (or its only one). Returns which byte changed."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(cache, copy)
    shards = sorted(path for path in (copy / "shards").iterdir() if shard_index(f"shards/{path.name}") is not None)
    path = shards[min(1, len(shards) - 1)]
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle] ^= 1
    path.write_bytes(data)
    return f"byte {middle:,} of {len(data):,} of {path.relative_to(copy.parent)}"


def problems_of(copy: Path) -> list[str]:
    """The problems that `fastkd verify` reports for the copy. Raises ReportError if there are none."""
    found = verify_cache(copy, deep=False)
    if found.ok:
        raise ReportError(f"{copy}: one of its bytes is wrong, but verify found no problem. Please report this bug.")
    return [str(problem) for problem in found.problems]
