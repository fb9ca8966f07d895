"""The basis of a feature: mean and principal components of its first vectors, as one object."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..encoding.hidden import is_sink, scales_of
from ..errors import CacheError, expect
from ..shard.container import Damage, Expected, check_bytes, content_hash, pack, read_attributes, unpack
from ..shard.kind import exactly
from ..spec import FORMAT

Array = NDArray[Any]
Floats = NDArray[np.float32]
MOST_WIDTH = 2**14
_ROUNDING = 1e-3  # by which the columns may be off from orthonormal
_BLOCK = 2**12


class _Compression(NamedTuple):
    compressor: str = "zstd"  # float32 hardly compresses, and zstd is quick
    level: int = 3


@dataclass(frozen=True, eq=False)
class Basis:
    """An orthonormal basis for vectors of W components, divided by their root mean square.

    mean: float32 `[W]`. basis: float32 `[W, W]`, whose columns are the components, by falling variance.
    scale: the median root mean square of a vector.

    Raises CacheError for arrays that are none.
    """

    mean: Floats
    basis: Floats
    scale: float

    def __post_init__(self) -> None:
        mean, basis = (np.ascontiguousarray(a, np.float32) for a in (self.mean, self.basis))
        width = len(mean) if mean.ndim == 1 else 0
        expect(1 <= width <= MOST_WIDTH, "basis: mean", mean.shape, f"[W], W from 1 to {MOST_WIDTH}")
        expect(basis.shape == (width, width), "basis: basis", basis.shape, f"[{width}, {width}]")
        scale = float(np.float32(self.scale))
        finite = np.isfinite(mean).all() and np.isfinite(basis).all() and 0 <= scale < np.inf
        expect(bool(finite), "basis", "NaN, an infinity or a negative scale", "finite numbers")
        for name, value in (("mean", mean), ("basis", basis), ("scale", scale)):
            object.__setattr__(self, name, value)

    @classmethod
    def learn(cls, vectors_MW: Array) -> "Basis":
        """The basis of these vectors, `[m, W]`; those without a usual scale are left out. CacheError if none is left.

        1,024 vectors are few, 16,384 enough for 576 components. The covariance is summed up in float64.
        """
        vectors_MW = np.asarray(vectors_MW)
        expect(vectors_MW.ndim == 2 and len(vectors_MW) > 0, "vectors", vectors_MW.shape, "[m, W], m ≥ 1")
        if not (finite := np.isfinite(vectors_MW).all(1)).all():
            raise CacheError(f"vectors: row {int(finite.argmin())}: got NaN or an infinity; expected finite numbers.")
        scales = scales_of(vectors_MW)
        median = float(np.float32(np.median(scales)))
        with np.errstate(over="ignore"):
            used = np.flatnonzero(~is_sink(scales.astype(np.float16), median))
        width = vectors_MW.shape[1]
        total, squares = np.zeros(width), np.zeros((width, width))
        for start in range(0, len(used), _BLOCK):
            rows = used[start : start + _BLOCK]
            r = vectors_MW[rows] / scales[rows, None]
            total += r.sum(0)
            squares += r.T @ r
        count = max(len(used), 1)
        mean = total / count
        _, components = np.linalg.eigh(squares / count - np.outer(mean, mean))
        components = components[:, ::-1]
        # The sign of an eigenvector is arbitrary: make its largest number positive.
        largest = np.abs(components).argmax(0)
        components = components * np.where(components[largest, np.arange(width)] < 0, -1, 1)
        return cls(mean.astype(np.float32), components.astype(np.float32), median)

    @property
    def width(self) -> int:
        """W."""
        return len(self.mean)

    @cached_property
    def sha256(self) -> str:
        """The hash of its arrays (FORMAT.md, "The hash of the contents"), by which the spec of a feature names it."""
        return content_hash(self._arrays())

    def to_bytes(self) -> bytes:
        """Its object: a Zarr group in a zip file, sealed like a shard."""
        arrays = self._arrays()
        attributes = {"format": FORMAT, "width": self.width, "content": self.sha256}
        return pack(arrays, attributes, _Compression(), self.width)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Basis":
        """The basis in an object. Damage if its bytes, or what they say, are not as expected."""
        attributes = read_attributes(check_bytes(data))
        width = attributes.get("width")
        if attributes.get("format") != FORMAT or type(width) is not int or not 1 <= width <= MOST_WIDTH:
            raise Damage(
                f"got format {attributes.get('format')!r} and width {width!r}; expected 1, and 1 to {MOST_WIDTH}"
            )
        w, one = exactly(width), exactly(1)
        shapes = {"mean": (w,), "basis": (w, w), "scale": (one,)}
        arrays = unpack(data, {name: Expected(("float32",), shape) for name, shape in shapes.items()})
        if missing := sorted(shapes.keys() - arrays.keys()):
            raise Damage("it is missing", missing[0])
        try:
            basis = cls(arrays["mean"], arrays["basis"], float(arrays["scale"][0]))
        except CacheError as error:
            raise Damage(str(error)) from error
        if basis.sha256 != attributes.get("content"):
            raise Damage("its arrays differ from the hash of its contents")
        return basis

    def check_orthonormal(self) -> None:
        """Damage unless its columns are orthonormal, but for rounding."""
        error = np.abs(self.basis.T @ self.basis - np.eye(self.width, dtype=np.float32)).max()
        if not error <= _ROUNDING:
            raise Damage(f"its columns are not orthonormal: their products are off by {error:.3g}", "basis")

    def _arrays(self) -> dict[str, Array]:
        return {"mean": self.mean, "basis": self.basis, "scale": np.array([self.scale], np.float32)}
