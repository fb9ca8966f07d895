"""The orthonormal basis in which hidden states are coded: learnt from states, and kept once on each device."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

SINK = 8.0
"""A row whose scale is outside [median / SINK, median * SINK] is stored exactly."""
NORMAL = (2.0**-14, 65504.0)
"""The range of normal float16 numbers, in which the scale of a coded row lies."""


class LearntBasis(NamedTuple):
    """mean `[W]`, basis `[W, W]` (columns are components, of falling variance), scale: the median rms of a row."""

    mean: Tensor
    basis: Tensor
    scale: float


def rms(x_NW: Tensor) -> Tensor:
    """Root mean square of each row `[N]`."""
    return x_NW.square().mean(1).sqrt()


def rms_of_any(x_NW: Tensor) -> Tensor:
    """The same `[N]` where squares are beyond the type's range, as of exact rows."""
    largest = x_NW.abs().amax(1)
    return rms(x_NW / torch.where(largest > 0, largest, 1.0)[:, None]) * largest


def unit_rows(x_NW: Tensor) -> Tensor:
    """Rows divided by their rms; a row of zeros stays zero."""
    scale = rms_of_any(x_NW)
    return x_NW / torch.where(scale > 0, scale, 1.0)[:, None]


def is_sink(scale_N: Tensor, median: float) -> Tensor:
    """Rows whose scale is too far from the median, or no normal float16: they are stored exactly, `[N]` bool."""
    coded = (scale_N >= median / SINK) & (scale_N <= median * SINK)
    return ~(coded & (scale_N >= NORMAL[0]) & (scale_N <= NORMAL[1]))


def learn_basis(states_NW: Tensor) -> LearntBasis:
    """The Karhunen-Loève basis of states: the eigenvectors of the covariance of x / rms(x), in float64, as float32.

    Sinks (`is_sink`) are left out. Without states it is the identity.
    """
    x = states_NW.detach().double()
    scale, width = rms(x), x.shape[1]
    median = float(scale.median()) if len(x) else 1.0
    r = unit_rows(x[~is_sink(scale, median)])
    mean = r.mean(0) if len(r) else x.new_zeros(width)
    covariance = (r - mean).T @ (r - mean) / max(len(r), 1)
    basis = torch.linalg.eigh(covariance).eigenvectors.flip(1)
    return LearntBasis(mean.float(), basis.float().contiguous(), median)


class _PerBasis:
    """Values that depend on a basis, computed once for each: they go when the basis does."""

    def __init__(self) -> None:
        self._values: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def get(self, basis: Tensor, key: Any, make: Any) -> Any:
        if basis not in self._values:
            self._values[basis] = {}
        found = self._values[basis]
        if key not in found:
            found[key] = make()
        return found[key]


_PER_BASIS = _PerBasis()


def center(mean_W: Tensor, basis_WW: Tensor, dtype: torch.dtype) -> Tensor:
    """mean @ basis `[W]`: the coordinates of the mean, which are added to the codes."""

    def make() -> tuple[Tensor, Tensor]:
        return mean_W, (mean_W.to(torch.float64) @ basis_WW.to(torch.float64)).to(dtype)

    if torch.compiler.is_compiling():
        return make()[1]
    found: tuple[Tensor, Tensor] = _PER_BASIS.get(basis_WW, ("center", dtype), make)
    return found[1] if found[0] is mean_W else make()[1]


def moved(tensor: Tensor, device: torch.device, non_blocking: bool) -> Tensor:
    """A tensor on a device, copied once: a basis is shared by all micro-batches."""
    if tensor.device == device:
        return tensor
    found: Tensor = _PER_BASIS.get(tensor, device, lambda: tensor.to(device, non_blocking=non_blocking))
    return found
