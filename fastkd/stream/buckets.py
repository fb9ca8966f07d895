"""Lengths that micro-batches are padded to, so that a training has few shapes: `torch.compile`, and what is tuned by
shape, then sees each of them soon.

Padding changes no loss: pads have no label, no target, and nothing attends to them.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import StreamError

Ints = NDArray[np.int64]
# Multiples of 16: compiled code has other cases for masks of other lengths.
BUCKETS = (*range(16, 128, 16), *(n << octave for octave in range(5, 18) for n in (4, 5, 6, 7)))
"""The lengths of `buckets=True`: multiples of 16 up to 128, then four for each doubling, so that of a longer row at
most a fifth is pads."""


def as_buckets(value: Any) -> tuple[int, ...] | None:
    """The argument `buckets` of a source, as ascending lengths; None for no padding. StreamError if it is not one."""
    if value is None or value is False:
        return None
    if value is True:
        return BUCKETS
    given = list(value) if isinstance(value, Iterable) and not isinstance(value, (str, bytes)) else [value]
    wrong = [n for n in given if isinstance(n, bool) or not hasattr(n, "__index__") or int(n) < 1]
    if not given or wrong:
        raise StreamError(
            f"buckets: got {value!r}; expected lengths in positions, such as (128, 256, 512), one length whose "
            "multiples are meant, or True."
        )
    return tuple(sorted({int(n) for n in given}))


def up_to(buckets: tuple[int, ...], *limits: int | None) -> tuple[int, ...]:
    """The buckets within the limits of models, the maximum positions of a row (None: no limit). The last
    bucket is the smallest limit."""
    most = min((limit for limit in limits if limit is not None), default=None)
    return buckets if most is None else (*(n for n in buckets if n < most), most)


def bucket_of(lengths: Ints, buckets: tuple[int, ...] | None, most: int | None) -> Ints:
    """What rows of these lengths are padded to: the next bucket; beyond the last one, its next multiple.

    most: the positions of a micro-batch, which a row is not padded beyond (None: no limit).
    """
    if buckets is None:
        return lengths
    steps, last = np.array(buckets, np.int64), buckets[-1]
    found = np.where(
        lengths <= last, steps[np.minimum(np.searchsorted(steps, lengths), len(steps) - 1)], -(-lengths // last) * last
    )
    return found if most is None else np.where(lengths <= most, np.minimum(found, most), found)
