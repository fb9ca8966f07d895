"""The size of an optimizer step, where the settings do not say: smaller for small data, so that it makes enough steps.

    16,384 positions, or of less data the largest power of two with which an epoch has at least 100 steps

but at least 1,024 positions of text, or 32 examples, and at least the longest sequence, which is never divided. It
depends on the data alone, so that twice as many epochs are twice as many steps.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from ..settings import TrainSettings

DEFAULT = 16384
STEPS = 100
LEAST, LEAST_EXAMPLES = 1024, 32


class Size(NamedTuple):
    """What an epoch reads. positions, sequences: of them. longest: positions of the longest sequence, or more. copies:
    positions of an example; 0 for text."""

    positions: int
    sequences: int
    longest: int
    copies: int = 0


def chosen_batch(size: Size) -> int:
    """Positions of a step, on average."""
    wanted = max(1, size.positions // STEPS)
    power = 1 << (wanted.bit_length() - 1)
    least = LEAST_EXAMPLES * size.copies if size.copies else LEAST
    return max(min(power, DEFAULT), min(least, DEFAULT), size.longest)


def with_batch(settings: TrainSettings, size: Size | None, begun: Mapping[str, Any]) -> TrainSettings:
    """The settings with `batch_tokens` filled in. size: of the data; None for a source from outside, which has its own
    steps. begun: see `begun_with`."""
    if settings.batch_tokens is not None:
        return settings
    known = begun.get("batch_tokens")
    if known is None:
        known = DEFAULT if size is None or settings.batch_size is not None else chosen_batch(size)
    return replace(settings, batch_tokens=known)
