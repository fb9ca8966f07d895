"""What a shard of a feature must look like, and its streams: the table of FORMAT.md in code. No files."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..encoding.hidden import MOST_CODE, is_sink, scales_of
from ..errors import CacheError
from ..shard.container import Damage, Expected
from ..shard.kind import ShardKind, exactly, need
from ..workspace import Workspace
from .spec import DTYPES, FeatureSpec, vector_numbers

Array = NDArray[Any]
Arrays = dict[str, Array]
COUNTS = ("positions", "vectors", "exact")
LARGEST_PAGE, SMALLEST_PAGE = 2**18, 2**11  # numbers
GROUP = 4  # components that lie side by side: 8 bytes, which are moved at once
_TILE = 2048, 8  # rows and groups of a block that is transposed at once: they stay in the cache of a core


class FeatureShards(ShardKind):
    """The shards of a feature. median: the scale of its basis, which the deep check needs."""

    noun, whole = "state", "feature"
    counts = COUNTS
    hashes = ("content", "base")

    def __init__(self, spec: FeatureSpec, median: float) -> None:
        super().__init__(spec.hash, spec.folder, f"feature {spec.name} of ")
        self.spec = spec
        self.median = median

    def check_counts(self, attributes: Mapping[str, Any]) -> None:
        spec = self.spec
        n, m, exact = (attributes[name] for name in COUNTS)
        need(1 <= n <= spec.most_positions, attributes, "positions", f"1 to {spec.most_positions}")
        full = n * spec.vectors
        fits = m == full if spec.positions == "all" else m <= full and m % spec.vectors == 0
        need(fits, attributes, "vectors", f"{full}, of {n} positions, or those of some of them")
        need(exact <= m, attributes, "exact", f"at most {m}")

    def expected(self, attributes: Mapping[str, Any]) -> dict[str, Expected]:
        m, e, w = (exactly(size) for size in (attributes["vectors"], attributes["exact"], self.spec.width))
        groups = -(-self.spec.width // GROUP)
        arrays = {
            "codes": Expected(("int16",), (exactly(groups), exactly(GROUP * attributes["vectors"]))),
            "exact": Expected((DTYPES[self.spec.dtype],), (e, w)),
            "exact_rows": Expected(("uint32",), (e,)),
            "scale": Expected(("float16",), (m,)),
        }
        if self.spec.positions != "all":
            arrays["rows"] = Expected(("uint32",), (exactly(attributes["vectors"] // self.spec.vectors),))
        return arrays

    def check_values(self, attributes: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        decoded = decode_shard(self.spec, attributes, arrays)
        exact = np.zeros(attributes["vectors"], bool)
        exact[decoded["exact_rows"]] = True
        if decoded["codes"].size and int(decoded["codes"].min()) < -MOST_CODE:
            raise Damage(f"got numbers below -{MOST_CODE}", "codes")
        if decoded["codes"][exact].any():
            raise Damage("got numbers other than 0 in exact rows", "codes")
        padding = -self.spec.width % GROUP
        if padding and arrays["codes"][-1].reshape(-1, GROUP)[:, -padding:].any():
            raise Damage("got numbers other than 0 beyond the last component", "codes")
        if arrays["scale"][exact].any() or np.signbit(arrays["scale"]).any():
            raise Damage("got numbers other than 0 in exact rows, or negative ones", "scale")
        if is_sink(arrays["scale"][~exact], self.median).any():
            raise Damage("got numbers that only exact rows have", "scale")


def encode_shard(spec: FeatureSpec, median: float, positions: int, arrays: Mapping[str, Any], rows: Any) -> Arrays:
    """The streams of a shard of `positions` positions, from the arrays of `encode_hidden` and `rows` `[m]`.

    median: the scale of the basis. CacheError, naming the argument, if they are not such arrays.
    """
    codes = _array("codes", arrays.get("codes"), "int16", (None, spec.width))
    m = len(codes)
    scale = _array("scale", arrays.get("scale"), "float32", (m,))
    exact_rows = _numbers("exact_rows", arrays.get("exact_rows"), None, m)
    exact = _array("exact", arrays.get("exact"), "float32", (len(exact_rows), spec.width))
    full = positions * spec.vectors
    whole = m == full and (rows is None or np.array_equal(np.asarray(rows), np.arange(full)))
    if not whole and (rows is None or spec.positions == "all"):
        raise CacheError(f"rows: got {m} vectors; expected all {full} of the {positions} positions of the shard.")
    if int(codes.min(initial=0)) < -MOST_CODE:
        raise CacheError(f"codes: got {codes.min()}; expected -{MOST_CODE} to {MOST_CODE}.")
    codes[exact_rows] = 0
    scale[exact_rows] = 0
    with np.errstate(over="ignore", invalid="ignore"):
        half = scale.astype(np.float16)
    rest = np.ones(m, bool)
    rest[exact_rows] = False
    if (half != scale).any() or is_sink(half[rest], median).any():
        raise CacheError("scale: got numbers that no row but an exact one has; expected what encode_hidden returns.")
    if not np.isfinite(exact).all():
        raise CacheError("exact: got NaN or an infinity; expected finite numbers.")
    streams = {
        "codes": _grouped(codes),
        "exact": _narrowed(exact, spec.dtype),
        "exact_rows": _gaps(exact_rows),
        "scale": half,
    }
    if spec.positions != "all":
        every = np.arange(full) if rows is None else _numbers("rows", rows, m, full)
        chosen = every[:: spec.vectors] // spec.vectors
        if m % spec.vectors or not np.array_equal(every, vector_numbers(chosen, spec.vectors)):
            raise CacheError(f"rows: expected all {spec.vectors} vectors of each position, or none of them.")
        streams["rows"] = _gaps(chosen)
    return streams


def page_of(codes: Array) -> int:
    """How many of the codes share their statistics: those of a group, or of a part of it; of some groups if few."""
    size = max(int(codes.shape[1]), 1)
    return -(-size // -(-size // LARGEST_PAGE)) if size >= SMALLEST_PAGE else size * -(-SMALLEST_PAGE // size)


def decode_shard(
    spec: FeatureSpec, attributes: Mapping[str, Any], arrays: Mapping[str, Array], into: Workspace | None = None
) -> Arrays:
    """The arrays of `Feature.read_codes`, from those that `unpack` found to be as expected.

    Damage if one is missing, or a number is out of its range.
    """
    m, n = attributes["vectors"], attributes["positions"]
    wanted = ("codes", "exact", "exact_rows", "scale", *(("rows",) if spec.positions != "all" else ()))
    if missing := [name for name in wanted if name not in arrays]:
        raise Damage("it is missing", missing[0])
    exact = _widened(arrays["exact"], spec.dtype)
    exact_rows = _from_gaps("exact_rows", arrays["exact_rows"], m)
    rows = np.arange(m)
    if spec.positions != "all":
        rows = vector_numbers(_from_gaps("rows", arrays["rows"], n), spec.vectors)
    scale = arrays["scale"].astype(np.float32)
    for name, numbers in (("scale", scale), ("exact", exact)):
        if not np.isfinite(numbers).all():
            raise Damage("got NaN or an infinity", name)
    scale[exact_rows] = scales_of(exact)
    codes = (into or Workspace()).array("codes", (m, spec.width), np.dtype(np.int16))
    _ungroup(arrays["codes"], codes)
    return {"codes": codes, "scale": scale, "exact_rows": exact_rows, "exact": exact, "rows": rows}


def check_base(base: str | bytes, positions: int, content: str | bytes, expected: int) -> None:
    """Damage unless a shard belongs to the cache's shard of these contents and this number of positions.

    base, positions: of the feature's shard, from its attributes or the manifest.
    """
    if base != content:
        raise Damage("it belongs to another shard of the cache than the one of this number that is there")
    if positions != expected:
        raise Damage(f"got {positions} positions; expected {expected}, as in the cache's shard")


def _grouped(codes_MW: Array) -> Array:
    """Codes `[m, W]` as they lie on disk: `[⌈W/4⌉, 4m]`, four components of the first vector, of the second, ..."""
    m, width = codes_MW.shape
    if padding := -width % GROUP:
        codes_MW = np.concatenate([codes_MW, np.zeros((m, padding), np.int16)], axis=1)
    groups = np.ascontiguousarray(codes_MW).view(np.uint64).T
    return np.ascontiguousarray(groups).view(np.int16)


def _ungroup(codes: Array, out_MW: Array) -> None:
    """The inverse of `_grouped`, in blocks, which is three times as fast as at once."""
    width = out_MW.shape[1]
    if width % GROUP:
        for i in range(GROUP):
            some = out_MW[:, i::GROUP]
            some[...] = codes[: some.shape[1], i::GROUP].T
        return
    groups, out = codes.view(np.uint64), out_MW.view(np.uint64)
    rows, columns = _TILE
    for i in range(0, len(out), rows):
        for j in range(0, len(groups), columns):
            out[i : i + rows, j : j + columns] = groups[j : j + columns, i : i + rows].T


def _gaps(rows: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Ascending numbers as how many are left out before each."""
    return (np.diff(rows, prepend=-1) - 1).astype(np.uint32)


def _from_gaps(name: str, gaps: Array, below: int) -> NDArray[np.int64]:
    rows: NDArray[np.int64] = np.cumsum(gaps.astype(np.int64) + 1) - 1
    if len(rows) and int(rows[-1]) >= below:
        raise Damage(f"got rows up to {rows[-1]}; expected numbers below {below}", name)
    return rows


def _narrowed(exact: Array, dtype: str) -> Array:
    """Exact rows in the teacher's dtype. CacheError if it does not hold them."""
    with np.errstate(over="ignore"):
        narrow = (exact.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else exact.astype(dtype)
    if not np.array_equal(_widened(narrow, dtype), exact):
        raise CacheError(
            f"exact: got numbers that {dtype}, the dtype of the spec, does not have; expected the teacher's."
        )
    return narrow


def _widened(exact: Array, dtype: str) -> NDArray[np.float32]:
    if dtype == "bfloat16":
        return (exact.astype(np.uint32) << 16).view(np.float32)
    return exact.astype(np.float32)


def _array(name: str, value: Any, dtype: str, shape: tuple[int | None, ...]) -> Array:
    """A copy, of this type and shape."""
    if not isinstance(value, np.ndarray) or value.dtype.name != dtype or value.ndim != len(shape):
        got = f"{value.dtype} of shape {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
        raise CacheError(f"{name}: got {got}; expected an array of {dtype} of {len(shape)} dimensions.")
    if any(size not in (None, have) for size, have in zip(shape, value.shape, strict=True)):
        raise CacheError(f"{name}: got shape {value.shape}; expected {shape}.")
    return np.array(value, order="C")


def _numbers(name: str, value: Any, count: int | None, below: int) -> NDArray[np.int64]:
    """Strictly ascending numbers from 0 to below `below`."""
    array = np.asarray(value)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size) or (count is not None and len(array) != count):
        wanted = "row numbers" if count is None else f"{count} row numbers, one a vector"
        raise CacheError(f"{name}: got {array.dtype} of shape {array.shape}; expected {wanted}.")
    array = array.astype(np.int64)
    if len(array) and (array[0] < 0 or array[-1] >= below or (np.diff(array) <= 0).any()):
        raise CacheError(f"{name}: expected ascending numbers from 0 to {below - 1}.")
    return array
