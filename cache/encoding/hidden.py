"""Hidden states as small integers, and back: KLT coordinates on one step, with a scale a vector. No files.

A vector x of W components becomes a scale s, its root mean square in float16, and the coordinates z = (x/s) @ basis in
an orthonormal basis of falling variance, whose distance from the mean's is rounded to multiples of one step:

    codes = round((x/s − mean) @ basis / step)        z = codes·step + mean @ basis        x = s · z @ basisᵀ

Vectors unlike the ones that the basis was learnt from ("sinks") are kept as they are: *exact* rows.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Arrays = dict[str, Array]
Floats = NDArray[np.float32]

SINK = 8.0  # a vector is exact if its scale is beyond this factor of the median, in either direction
MOST_CODE = 2**15 - 1  # of a code's absolute value
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-14, 65504.0  # normal numbers of float16
_BLOCK = 2**14  # vectors at a time: bounds memory


class KLT(Protocol):
    """The basis of a feature; `Basis` is one."""

    @property
    def mean(self) -> Floats:
        """Of x/s, `[W]`."""

    @property
    def basis(self) -> Floats:
        """`[W, W]`, orthonormal; its columns are components."""

    @property
    def scale(self) -> float:
        """The median root mean square of a vector."""


def scales_of(vectors_MW: Array) -> NDArray[np.float64]:
    """The root mean square of each vector, `[m]`, before it is rounded."""
    squares = np.empty(len(vectors_MW))
    for start in range(0, len(vectors_MW), _BLOCK):
        block = vectors_MW[start : start + _BLOCK].astype(np.float64)
        squares[start : start + _BLOCK] = np.einsum("mw,mw->m", block, block)
    return np.asarray(np.sqrt(squares / vectors_MW.shape[1]))


def is_sink(scales_M: Array, median: float) -> NDArray[np.bool_]:
    """Whether vectors of these scales (in float16) are kept exactly, whatever their direction."""
    scales = scales_M.astype(np.float64)
    usual = (scales >= max(SMALLEST_SCALE, median / SINK)) & (scales <= min(LARGEST_SCALE, median * SINK))
    return np.asarray(~usual)


def encode_hidden(vectors_MW: Floats, basis: KLT, step: float) -> Arrays:
    """Vectors as codes int16 `[m, W]`, scale float32 `[m]`, exact_rows int64 `[e]`, and exact float32 `[e, W]`.

    scale is rounded to float16. In exact rows it is the root mean square in float32, and the codes are 0.
    Raises ValueError for NaN and infinities, naming the first row.
    """
    vectors_MW = np.asarray(vectors_MW, np.float32)
    if not (finite := np.isfinite(vectors_MW).all(1)).all():
        raise ValueError(f"vectors: row {int(finite.argmin())}: got NaN or an infinity; expected finite numbers")
    rms_M = scales_of(vectors_MW)
    with np.errstate(over="ignore"):
        scale_M = rms_M.astype(np.float16).astype(np.float32)
    exact_M = is_sink(scale_M, basis.scale)
    codes_MW = np.zeros(vectors_MW.shape, np.int16)
    projection_WW = basis.basis / np.float32(step)
    for start in range(0, len(vectors_MW), _BLOCK):
        rows = start + np.flatnonzero(~exact_M[start : start + _BLOCK])
        codes = (vectors_MW[rows] / scale_M[rows, None] - basis.mean) @ projection_WW
        np.rint(codes, out=codes)
        fits = (np.abs(codes) <= MOST_CODE).all(1)
        exact_M[rows[~fits]] = True
        codes_MW[rows[fits]] = codes[fits]
    exact_rows = np.flatnonzero(exact_M)
    scale_M[exact_rows] = rms_M[exact_rows]
    return {"codes": codes_MW, "scale": scale_M, "exact_rows": exact_rows, "exact": vectors_MW[exact_rows]}


def decode_coordinates(arrays: Mapping[str, Array], basis: KLT, step: float) -> Floats:
    """z float32 `[m, W]`, from the arrays of `encode_hidden`: x/rms in the basis. Exact rows are not rounded."""
    z_MW = arrays["codes"].astype(np.float32)
    z_MW *= np.float32(step)
    z_MW += basis.mean @ basis.basis
    rows, exact_EW = arrays["exact_rows"], arrays["exact"]
    scale_E = arrays["scale"][rows][:, None]
    z_MW[rows] = np.divide(exact_EW, scale_E, out=np.zeros_like(exact_EW), where=scale_E > 0) @ basis.basis
    return z_MW


def decode_states(arrays: Mapping[str, Array], basis: KLT, step: float) -> Floats:
    """The vectors float32 `[m, W]`, from the arrays of `encode_hidden`. Exact rows are as they were."""
    states_MW = np.empty(arrays["codes"].shape, np.float32)
    rotation_WW = basis.basis.T * np.float32(step)
    for start in range(0, len(states_MW), _BLOCK):
        some = slice(start, start + _BLOCK)
        r = arrays["codes"][some] @ rotation_WW
        r += basis.mean
        np.multiply(r, arrays["scale"][some, None], out=states_MW[some])
    states_MW[arrays["exact_rows"]] = arrays["exact"]
    return states_MW
