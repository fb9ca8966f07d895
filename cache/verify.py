"""Is every shard the one that was committed? Every byte is read; deep: every array is decoded as well."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from .errors import CacheError, NotFound
from .manifest import gaps, overlaps, row_of, table_of
from .scan import PREFIX, listed, shard_index, shard_key
from .shard import check_attributes, decode_shard
from .shardfile import Damage, content_hash, digest, stored_digest, unpack

if TYPE_CHECKING:
    from .reader import Cache


@dataclass(frozen=True)
class Problem:
    """What is wrong: with which shard (None: with the cache), and in which array (None: not known, or all)."""

    shard: int | None
    array: str | None
    what: str

    def __str__(self) -> str:
        place = "the cache" if self.shard is None else f"shard {self.shard}"
        return f"{place}{f', array {self.array}' if self.array else ''}: {self.what}"


@dataclass
class Report:
    """What `verify` found. Falsy where there is a problem."""

    shards: int = 0
    positions: int = 0
    bytes: int = 0
    deep: bool = False
    sealed: bool = False
    problems: list[Problem] = field(default_factory=list)
    missing: list[int] = field(
        default_factory=list
    )  # of an unsealed cache: numbers below the highest that are not there

    @property
    def ok(self) -> bool:
        return not self.problems

    def __bool__(self) -> bool:
        return self.ok


def verify(cache: "Cache", *, deep: bool = True, progress: bool = False) -> Report:
    """Check every shard of a cache.

    Each object is read whole and compared with its own hash, its name, the spec, and (sealed) the manifest. deep: its
    arrays are decoded as a reader would, and their contents compared with the hash of them. Shards that are missing
    between others, that overlap, or that a sealed cache does not know are problems too. Raises StoreError where the
    store fails.
    """
    report = Report(deep=deep, sealed=cache.sealed)
    there = listed(cache.store)
    known = {row["shard"]: row for row in cache.manifest.to_pylist()} if cache.sealed else {}
    rows: list[dict[str, Any]] = []
    indices = sorted(there.keys() | known.keys())
    for index in tqdm(indices, unit="shard", disable=not progress, desc="verify"):
        for problem in _check(cache, index, known.get(index), deep, report, rows):
            report.problems.append(problem)
    table = table_of(rows)
    if not cache.sealed:
        report.missing = [index for index in gaps(table) if index not in there]
        for index in report.missing:
            if index > indices[0]:
                report.problems.append(Problem(index, None, "it is missing, between others that are there"))
    for one, other in overlaps(table):
        report.problems.append(Problem(other, None, f"it holds some of the sequences of shard {one}"))
    for entry in cache.store.list(PREFIX):
        if shard_index(entry.key) is None:
            report.problems.append(Problem(None, None, f"{entry.key} is no shard's name"))
    return report


def _check(
    cache: "Cache", index: int, known: dict[str, Any] | None, deep: bool, report: Report, rows: list[dict[str, Any]]
) -> Iterator[Problem]:
    try:
        data = cache.store.get(shard_key(index))
    except NotFound:
        yield Problem(index, None, "it is in the manifest, and its object is missing")
        return
    report.shards += 1
    report.bytes += len(data)
    try:
        attributes, arrays = unpack(data)
        check_attributes(attributes, cache.spec, index)
        row = row_of(attributes, len(data), stored_digest(data))
        if cache.sealed and known is None:
            yield Problem(index, None, "it is not in the manifest: it was written after the cache was sealed")
        elif known is not None and known["object_sha256"] != bytes.fromhex(digest(data)):
            raise Damage("it is another object than the one that was sealed")
        elif known is not None and known != row:
            raise Damage("the manifest says something else of it")
        if deep:
            if content_hash(arrays) != attributes.get("content"):
                raise Damage("what it decodes to differs from the hash of it")
            _check_decoded(decode_shard(cache.spec, attributes, arrays), attributes)
    except (Damage, CacheError) as error:
        yield Problem(index, getattr(error, "array", None), str(error))
        return
    rows.append(row)
    report.positions += row["positions"]


def _check_decoded(decoded: dict[str, Any], attributes: dict[str, Any]) -> None:
    """The counts that the shard gives of itself."""
    used = decoded["logprobs"] > -np.inf
    drawn = decoded["draws"] > 0 if "draws" in decoded else np.zeros_like(used)
    counts = {
        "counted": int(used.any(1).sum()),
        "head_entries": int((used & ~drawn).sum()),
        "draw_entries": int(drawn.sum()),
        "sequences": len(decoded["sequence_lengths"]),
        "positions": len(used),
    }
    for name, value in counts.items():
        if attributes.get(name) != value:
            raise Damage(f"it says {attributes.get(name)} {name}, and holds {value}")
