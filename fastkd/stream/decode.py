"""Deprecated functions from a cache's arrays to SparseTargets."""

import warnings
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from ..cache import CacheSpec
from ..errors import StreamError
from ..kernels import SparseTargets
from ..kernels.targets import FIELDS


def targets_from_raw(*args: Any, **kwargs: Any) -> NoReturn:
    """Removed: decoded a shard's streams on a device. Raises StreamError."""
    raise StreamError(
        "targets_from_raw: targets are always decoded on the host now. Use "
        "SparseTargets.from_arrays(cache.read_shard(index), ...)."
    )


def targets_from_arrays(
    arrays: Mapping[str, NDArray[Any]], spec: CacheSpec, *, device: torch.device | str = "cpu", compact: bool = False
) -> SparseTargets:
    """Deprecated: use `SparseTargets.from_arrays`. compact: keep only the positions that count, with an index."""
    instead = "SparseTargets.from_arrays(arrays, vocab_size=..., temperatures=..., draw_temperature=...)"
    warnings.warn(f"targets_from_arrays: use {instead}.", DeprecationWarning, stacklevel=2)
    index = None
    if compact:
        # a position that does not count has no entries, not even a first one
        index = np.flatnonzero(arrays["logprobs"][:, 0] > -np.inf)
        arrays = {field.name: arrays[field.name][index] for field in FIELDS if field.name in arrays}
    settings: Any = {name: getattr(spec, name) for name in ("vocab_size", "temperatures", "draw_temperature")}
    return SparseTargets.from_arrays(arrays, device=device, index=index, **settings)
