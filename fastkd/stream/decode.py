"""From a cache's decoded arrays to SparseTargets: where the format on disk meets the math."""

from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..cache import CacheSpec
from ..errors import StreamError
from ..kernels import SparseTargets


def targets_from_raw(*args: Any, **kwargs: Any) -> NoReturn:
    """Removed: decoded a shard's streams on a device. Raises StreamError."""
    raise StreamError(
        "targets_from_raw: targets are always decoded on the host now. Use "
        "targets_from_arrays(cache.read_shard(index), cache.spec, device=device)."
    )


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
