"""Other formats for the same targets: common ones, and three published ones.

Each writes ids int32 `[n, k]` and log-probabilities float32 `[n, k]`, best first, to a file, and reads them back. None
stores the tail. The published ones are implemented from their descriptions, in NumPy:

- five bytes per entry: a 24-bit id and a float16 log-probability, as in Megatron-LM's offline distillation;
- ids of 17 bits (any vocabulary up to 131,072), the first log-probabilities as float16 and the others by a polynomial
  in the logarithm of their index, as in DistillKit;
- entries drawn from the whole distribution, 24 bits each: a 17-bit id and a 7-bit count (Random Sampling KD, Anshumann
  et al. 2025).
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from numpy.typing import NDArray

Array = NDArray[Any]
Pair = tuple[Array, Array]
BITS = 17  # per id
EXACT = 8  # log-probabilities stored exactly
TERMS = 5  # of the polynomial
DRAWS = 50  # of a row
_COUNT_BITS = 7


class Format(Protocol):
    """A format: writes `[n, k]` ids and log-probabilities to a path, and reads them."""

    def write(self, path: Path, ids: Array, logprobs: Array) -> None: ...
    def read(self, path: Path) -> Pair: ...


class Parquet:
    """int32 and float16 lists, zstd."""

    def write(self, path: Path, ids: Array, logprobs: Array) -> None:
        k = ids.shape[1]
        columns = [
            pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), k)
            for values in (ids, logprobs.astype(np.float16))
        ]
        pq.write_table(pa.table(columns, names=["ids", "logprobs"]), path, compression="zstd")

    def read(self, path: Path) -> Pair:
        table = pq.read_table(path)
        k = table.schema.field("ids").type.list_size
        ids, logprobs = (table.column(name).combine_chunks().flatten().to_numpy() for name in ("ids", "logprobs"))
        return ids.reshape(-1, k), logprobs.reshape(-1, k).astype(np.float32)


class Zarr:
    """int32 and float16 arrays, zarr's own compression, chunks of 4096 positions."""

    def write(self, path: Path, ids: Array, logprobs: Array) -> None:
        group = zarr.open_group(path, mode="w")
        for name, values in (("ids", ids), ("logprobs", logprobs.astype(np.float16))):
            array = group.create_array(name, shape=values.shape, chunks=(4096, values.shape[1]), dtype=values.dtype)
            array[:] = values

    def read(self, path: Path) -> Pair:
        group = zarr.open_group(path, mode="r")
        ids, logprobs = (np.asarray(group[name][:]) for name in ("ids", "logprobs"))  # type: ignore[index]
        return ids, logprobs.astype(np.float32)


class FiveBytes:
    """A 24-bit id and a float16 log-probability per entry."""

    def write(self, path: Path, ids: Array, logprobs: Array) -> None:
        entries = np.empty((*ids.shape, 5), np.uint8)
        entries[..., :3] = ids.astype("<u4")[..., None].view(np.uint8)[..., :3]
        entries[..., 3:] = logprobs.astype("<f2")[..., None].view(np.uint8)
        _save(path, ids.shape[1], entries)

    def read(self, path: Path) -> Pair:
        k, data = _load(path)
        entries = data.reshape(-1, k, 5)
        ids = np.zeros((len(entries), k, 4), np.uint8)
        ids[..., :3] = entries[..., :3]
        values = np.ascontiguousarray(entries[..., 3:]).view("<f2")[..., 0]
        return ids.view("<i4")[..., 0], values.astype(np.float32)


class Polynomial:
    """17-bit ids; EXACT log-probabilities as float16, the others by TERMS coefficients of a least-squares fit."""

    def write(self, path: Path, ids: Array, logprobs: Array) -> None:
        packed = _packed(ids)
        exact = logprobs[:, :EXACT].astype("<f2")
        _, fit = _basis(ids.shape[1] - EXACT)
        # relative to the last exact one, so that the coefficients stay small
        terms = ((logprobs[:, EXACT:] - exact[:, -1:].astype(np.float32)) @ fit).astype("<f2")
        rows = np.concatenate([packed, exact.view(np.uint8), terms.view(np.uint8)], 1)
        _save(path, ids.shape[1], rows)

    def read(self, path: Path) -> Pair:
        k, data = _load(path)
        wide = k * BITS // 8
        rows = data.reshape(-1, wide + 2 * (EXACT + TERMS))
        values = np.ascontiguousarray(rows[:, wide:]).view("<f2").astype(np.float32)
        basis, _ = _basis(k - EXACT)
        logprobs = np.empty((len(rows), k), np.float32)
        logprobs[:, :EXACT] = values[:, :EXACT]
        logprobs[:, EXACT:] = values[:, EXACT:] @ basis + values[:, EXACT - 1 : EXACT]
        return _unpacked(rows[:, :wide], k), logprobs


@dataclass(frozen=True)
class Sampled:
    """Drawn entries: a 17-bit id and a 7-bit count each, with a byte per row for the number of entries."""

    def write(self, path: Path, ids: Array, counts: Array) -> None:
        """counts int `[n, k]`: 0 where there is no entry; entries first."""
        entries = ids.astype("<u4") | (counts.astype("<u4") << BITS)
        used = counts > 0
        data = np.ascontiguousarray(entries[used])[:, None].view(np.uint8)[:, :3]
        sizes = used.sum(1).astype(np.uint8)
        _save(path, len(ids), np.concatenate([sizes, data.reshape(-1)]))

    def read(self, path: Path) -> Pair:
        """ids, and the logarithms of counts / DRAWS: −inf where there is no entry."""
        n, data = _load(path)
        sizes, body = data[:n].astype(np.int64), data[n:].reshape(-1, 3)
        entries = np.zeros((len(body), 4), np.uint8)
        entries[:, :3] = body
        flat = entries.view("<u4")[:, 0]
        used = np.arange(int(sizes.max())) < sizes[:, None]
        ids, counts = np.zeros(used.shape, np.int32), np.zeros(used.shape, np.float32)
        ids[used] = flat & (2**BITS - 1)
        counts[used] = flat >> BITS
        with np.errstate(divide="ignore"):
            return ids, np.log(counts / DRAWS)


def _save(path: Path, number: int, data: Array) -> None:
    with path.open("wb") as file:
        file.write(np.array([number], "<i8").tobytes())
        file.write(np.ascontiguousarray(data).data)


def _load(path: Path) -> tuple[int, Array]:
    data = np.fromfile(path, np.uint8)
    return int(data[:8].view("<i8")[0]), data[8:]


@lru_cache(maxsize=4)
def _basis(places: int) -> Pair:
    """Powers of the logarithm of an index `[TERMS, places]`, and their pseudo-inverse `[places, TERMS]`."""
    x = np.log(np.arange(1, places + 1)) / np.log(places + 1)
    basis = x ** np.arange(TERMS)[:, None]
    return basis.astype(np.float32), np.linalg.pinv(basis).astype(np.float32)


def _packed(ids: Array) -> Array:
    """Ids `[n, k]`, k a multiple of 8, as BITS bits each, `[n, k·BITS/8]`."""
    bits = (ids[:, :, None] >> np.arange(BITS)) & 1
    return np.packbits(bits.astype(np.uint8).reshape(len(ids), -1), axis=1, bitorder="little")


def _unpacked(packed: Array, k: int) -> Array:
    """The ids: eight of them take BITS bytes, and each lies within four of these."""
    groups = np.zeros((len(packed), k // 8, BITS + 3), np.int32)
    groups[..., :BITS] = packed.reshape(len(packed), k // 8, BITS)
    ids = np.empty((len(packed), k // 8, 8), np.int32)
    for place in range(8):
        byte, shift = divmod(place * BITS, 8)
        four = sum(groups[..., byte + i] << 8 * i for i in range(4))
        ids[..., place] = (four >> shift) & (2**BITS - 1)
    return ids.reshape(len(packed), k)
