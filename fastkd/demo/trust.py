"""Trust, shown: one byte of a copy of the cache is flipped, and `verify` says where."""

import shutil
from pathlib import Path

from ..cache import verify_cache
from ..cache.scan import shard_index
from ..errors import ReportError


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
