"""Memory that is reused for the arrays of the next shard."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


class Workspace:
    """Arrays by name, in memory that is reused. For one thread; a new array overwrites the previous one of that name.

    Touching a page of memory for the first time can cost more than decoding into it.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, NDArray[np.uint8]] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An uninitialized array of this name."""
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < size:
            # free the old one before allocating another
            buffer = None
            self._buffers.pop(name, None)
            buffer = self._buffers[name] = np.empty(size, np.uint8)
        result: NDArray[Any] = buffer[:size].view(dtype).reshape(shape)
        return result
