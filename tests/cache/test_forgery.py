"""Shards that somebody made up, under right hashes: refused by name, or read as the plain reader reads them."""

import io
import re
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import forgery
import numpy as np
import pytest
from forgery import KEY, SPECS, Arrays, run_script, shard_of

from fastkd.cache import Cache, CorruptShard
from fastkd.cache.encoding.ragged import Streams
from fastkd.cache.encoding.vocabulary import decode_lists
from fastkd.cache.shard.container import HASH_LENGTH, content_hash, digest, pack
from fastkd.cache.stores import MemoryStore


@pytest.mark.parametrize("name", SPECS)
def test_a_sample_of_typed_forgeries(name: str) -> None:
    assert sum(run_script(forgery.__file__, name, "150").values()) >= 150


@pytest.mark.soak
@pytest.mark.parametrize("name", SPECS)
def test_every_typed_forgery(name: str) -> None:
    assert sum(run_script(forgery.__file__, name, "all").values()) > 2000


def forged(changes: Callable[[Arrays], Arrays], name: str, **attributes: Any) -> Cache:
    """A cache whose one shard has other arrays, under right hashes."""
    spec = SPECS[name]
    old_attributes, arrays = shard_of(spec)
    arrays = arrays | changes(arrays)
    store = MemoryStore()
    store.create("spec.json", spec.to_json())
    everything = old_attributes | {"content": content_hash(arrays)} | attributes
    store.create(KEY, pack(arrays, everything, spec.settings, 24))
    return Cache(store, spec, None)


def with_value(array: np.ndarray, at: Any, value: int) -> np.ndarray:
    copy = array.copy()
    copy[at] = value
    return copy


def wrapping_codes(arrays: Arrays) -> Arrays:
    """The second code of the first row is 65,536 more than it was: in 16 bits the same."""
    values, counts = arrays["head/values"], arrays["head/counts"]
    first, rows = int(values[0]), int((counts > 0).sum())
    return {"head/values": with_value(with_value(values, 0, first + 1), rows, 2**16 - 1)}


def wrapping_ranks(arrays: Arrays) -> Arrays:
    return {"head/ties": with_value(arrays["head/ties"], 0, 2**16 - 1)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (wrapping_codes, "cannot be decoded ("),
        (wrapping_ranks, "got a rank that its type does not hold"),
        (lambda a: {"head/firsts": a["head/firsts"].astype(np.int16)}, "got type 'int16'; expected uint16 or uint32"),
        (lambda a: {"head/ties": a["head/ties"].astype(np.uint32)}, "got ties of type uint32; expected uint16"),
        (lambda a: {"tail": with_value(a["tail"], (0, 3), 2**30)}, "tail: got codes outside"),
        (lambda a: {"outcomes": with_value(a["outcomes"], 3, 41)}, "outcomes: got numbers outside"),
        (lambda a: {"inputs/tokens": with_value(a["inputs/tokens"].astype(np.int64), 3, 2**31)}, "inputs/tokens"),
        (lambda a: {"head/grid": a["head/grid"][:0]}, "head/grid"),
    ],
)
def test_numbers_outside_their_range_are_refused(changes: Callable[[Arrays], Arrays], message: str) -> None:
    cache = forged(changes, "contexts" if "ties" in message or changes is wrapping_ranks else "default")
    with pytest.raises(CorruptShard, match=re.escape(message)):
        cache.read_shard(0)
    assert not cache.verify().ok


def repeated_id(arrays: Arrays) -> Arrays:
    """Two entries of other codes have one rank."""
    counts = arrays["head/counts"]
    rows = int((counts > 0).sum())
    values = with_value(arrays["head/values"], slice(rows, None), 1)
    firsts = np.resize(arrays["head/firsts"], len(values))
    return {"head/values": values, "head/firsts": firsts * 0, "head/ties": arrays["head/ties"][:0]}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("default", lambda a: repeated_id(a) | {"head/grid": _grid(80)}, "id 2 twice|id \\d+ twice"),
        ("draws", lambda a: {"draws/repeats": a["draws/repeats"] * 0 + np.uint16(2)}, "draws of a row: .*at most 3"),
        ("default", lambda a: {"outcomes": a["outcomes"] * 0}, "outcomes: .*at least 1 where the tail is finite"),
        ("default", lambda a: {"tail": a["tail"] * 0 + np.int32(2**20)}, "a tail that a teacher can have"),
        ("default", lambda a: {"tail": np.where(a["tail"][0] == -(2**31), 0, a["tail"])}, "a row that does not count"),
    ],
)
def test_verify_deep_finds_what_no_teacher_says(name: str, changes: Callable[[Arrays], Arrays], message: str) -> None:
    """A reader takes such numbers, which harm nobody but the student."""
    cache = forged(changes, name)
    cache.read_shard(0)
    assert cache.verify(deep=False).ok
    assert [bool(re.search(message, problem.what)) for problem in cache.verify().problems] == [True]


def _grid(count: int) -> np.ndarray:
    return -np.arange(count, dtype=np.float32)


def test_lists_of_very_unequal_lengths_take_little_memory() -> None:
    """One list of 5,000 ids and 30,000 of one: a rectangle of them has 150 million elements."""
    lengths = np.array([5_000] + [1] * 30_000, np.uint16)
    total = int(lengths.sum(dtype=np.int64))
    firsts = np.zeros(len(lengths), np.uint16)
    streams = Streams(np.zeros(total, np.uint16), firsts, np.zeros(4_999, np.uint16), np.zeros(0, np.uint16))
    tracemalloc.start()
    try:
        ids = decode_lists(streams, lengths, np.arange(70_000))
        assert tracemalloc.get_traced_memory()[1] < 2**28
    finally:
        tracemalloc.stop()
    assert np.array_equal(ids[:5_000], np.arange(5_000))
    assert not ids[5_000:].any()


def members_of(data: bytes, change: Callable[[zipfile.ZipFile, zipfile.ZipInfo, bytes], None]) -> bytes:
    """The object with members that `change` writes, and a right hash."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for info in old.infolist():
            change(new, zipfile.ZipInfo(info.filename), old.read(info))
        new.comment = old.comment
    whole = buffer.getvalue()
    return whole[:-HASH_LENGTH] + digest(whole).encode()


def deflated(new: zipfile.ZipFile, info: zipfile.ZipInfo, content: bytes) -> None:
    new.writestr(info, content, zipfile.ZIP_DEFLATED if info.filename.startswith("tail") else zipfile.ZIP_STORED)


def twice(new: zipfile.ZipFile, info: zipfile.ZipInfo, content: bytes) -> None:
    new.writestr(info, content)
    if info.filename == "tail/zarr.json":
        new.writestr(zipfile.ZipInfo(info.filename), content)


def encrypted(new: zipfile.ZipFile, info: zipfile.ZipInfo, content: bytes) -> None:
    new.writestr(info, content)
    if info.filename.startswith("tail"):
        new.infolist()[-1].flag_bits |= 1


def outside(new: zipfile.ZipFile, info: zipfile.ZipInfo, content: bytes) -> None:
    new.writestr(info, content)
    if info.filename.startswith("tail"):
        new.infolist()[-1].header_offset += 2**20


def longer(new: zipfile.ZipFile, info: zipfile.ZipInfo, content: bytes) -> None:
    new.writestr(info, content)
    if info.filename.startswith("tail"):
        new.infolist()[-1].file_size = new.infolist()[-1].compress_size = 2**31


@pytest.mark.parametrize("change", [deflated, twice, encrypted, outside, longer])
def test_zip_directories_that_a_reader_does_not_take(change: Callable[..., None]) -> None:
    cache = forged(lambda arrays: {}, "default")
    store = MemoryStore()
    store.create(KEY, members_of(cache.store.get(KEY), change))
    with pytest.raises(CorruptShard, match=r"its member 'tail/|its zip directory"):
        Cache(store, cache.spec, None).read_shard(0)
    with pytest.raises(CorruptShard, match=r"its member 'tail/|its zip directory"):
        Cache(store, cache.spec, None).zarr_group(0)
