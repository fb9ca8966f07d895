"""Trust in a cache: nothing is trained from a damaged one; and shown, by a byte that is flipped and named."""

import shutil
from pathlib import Path

from ..cache import CacheError, verify_cache
from ..cache.scan import shard_index
from ..cache.verify import Report
from ..errors import ReportError
from .stages import Clock


def verified(cache: Path, clock: Clock) -> Report:
    """What `verify` says of a cache in which it finds nothing wrong. CacheError where it finds something."""
    with clock.stage("verify", "every byte of the cache against its hash"):
        found = verify_cache(cache, deep=True)
        if found.problems:
            raise CacheError(
                f"{cache}: {'; '.join(map(str, found.problems))}. Nothing was trained. Delete bad shards and "
                "manifest.parquet, and run it again: it captures what is missing, and nothing else."
            )
    return found


def flipped_copy(cache: Path, copy: Path) -> str:
    """A copy of a cache in which one byte in the middle of its second shard (or its only one) is another; which."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(cache, copy)
    shards = sorted(path for path in (copy / "shards").iterdir() if shard_index(f"shards/{path.name}") is not None)
    path = shards[min(1, len(shards) - 1)]
    data = bytearray(path.read_bytes())
    place = len(data) // 2
    data[place] ^= 1
    path.write_bytes(data)
    return f"byte {place:,} of {len(data):,} of {path.relative_to(copy.parent)}"


def named_by_verify(copy: Path) -> list[str]:
    """What `fastkd verify` finds in it. ReportError where it finds nothing: then nothing here could be trusted."""
    found = verify_cache(copy, deep=False)
    if found.ok:
        raise ReportError(f"{copy}: one byte of it is wrong, and verify found no problem. Please report this.")
    return [str(problem) for problem in found.problems]
