"""From a cache's arrays to SparseTargets on a device: where the format on disk meets the math.

raw = cache.raw_shard(3)
targets = targets_from_raw(raw, device="cuda")  # decoded there
tokens = raw["inputs/tokens"]
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..cache import CacheSpec
from ..kernels import SparseTargets, decode_targets

# Read on the host, where the sizes come from.
_ON_HOST = frozenset({"head/counts", "draws/counts", "temperatures"})
_STREAMS = ("values", "firsts", "ties", "repeats", "grid", "table", "list_begins")
_ON_DEVICE = frozenset({"tail", "outcomes", *(f"{part}/{name}" for part in ("head", "draws") for name in _STREAMS)})


def targets_from_raw(
    raw: Mapping[str, NDArray[Any]], *, device: torch.device | str = "cpu", compact: bool = False, impl: str = "auto"
) -> SparseTargets:
    """The targets of a shard (`Cache.raw_shard`), decoded on the device, with the numbers of `Cache.read_shard`.

    To a GPU go the streams, about half of what they decode to, from page-locked memory; nothing waits for it. For the
    CPU, `targets_from_arrays(cache.read_shard(index), cache.spec)` is the same and faster.
    compact: keep only the positions that count, with `index` their numbers in the shard. impl: see `decode_targets`.
    """
    device = torch.device(device)
    tensors: dict[str, Tensor] = {}
    for name, array in raw.items():
        if name in _ON_DEVICE:
            tensors[name] = _moved(array, device)
        elif name in _ON_HOST or array.ndim == 0:
            tensors[name] = torch.from_numpy(array)
    return decode_targets(tensors, compact=compact, impl=impl)


def targets_from_arrays(
    arrays: Mapping[str, NDArray[Any]],
    spec: CacheSpec,
    *,
    device: torch.device | str = "cpu",
    compact: bool = False,
) -> SparseTargets:
    """The targets among decoded arrays (`Cache.read_shard`, `Cache.sequences`) of a cache of this spec.

    On the CPU they share the arrays' memory, unless compact: keep only the positions that count, with `index` their
    numbers among the arrays' positions.
    """
    device = torch.device(device)
    names = [name for name in ("ids", "logprobs", "tail", "outcomes", "draws") if name in arrays]
    kept = None
    if compact:
        # entries come first in a row: one that does not count has none in its first place
        kept = np.flatnonzero(arrays["logprobs"][:, 0] > -np.inf)
    tensors = {name: _moved(arrays[name] if kept is None else arrays[name][kept], device) for name in names}
    return SparseTargets(
        **tensors,
        vocab_size=spec.vocab_size,
        temperatures=spec.temperatures,
        draw_temperature=spec.draw_temperature,
        index=None if kept is None else _moved(kept, device),
    )


def _moved(array: NDArray[Any], device: torch.device) -> Tensor:
    """A tensor on the device; on the CPU it shares the array's memory."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
