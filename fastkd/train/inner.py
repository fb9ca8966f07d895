"""Inner states of a student as outputs that objectives read by name.

"state:16": what enters layer 16, counted from 0 (the number of layers: what enters the final norm), `[B, L, D]`.
"module:NAME": the output of a module, such as a map `[B, C, H, W]`.
"attention:16": `QueriesKeysValues` of layer 16 at all B·L positions (`models/attention_taps.py`).
All carry gradients. They are recorded by forward hooks (`models/taps.py`), so nothing is asked of the model, and no
other state is kept.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import TrainError
from ..models.attention_taps import AttentionTaps
from ..models.taps import Taps

ATTENTION = "attention:"
KINDS = ("state", "module", "attention")


def is_inner(name: str) -> bool:
    """Whether an output's name is that of an inner state."""
    kind, _, rest = name.partition(":")
    return kind in KINDS and bool(rest)


class InnerOutputs:
    """Records inner states in every forward of a model, from now on. Raises TrainError for a layer or a module that it
    does not have, and for attention that cannot be recomputed.

    max_positions: the longest input that the model takes; None: unknown. With compiled layers, make it before the first
    forward.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], max_positions: int | None = None) -> None:
        names = tuple(names)
        self._attention = {
            name: AttentionTaps(model, int(name.removeprefix(ATTENTION)), max_positions, TrainError)
            for name in names
            if name.startswith(ATTENTION)
        }
        self._taps = Taps(model, [name for name in names if name not in self._attention], TrainError).attach()

    def take(self) -> dict[str, Any]:
        """The states of the last forward by name, which are then forgotten. Raises TrainError if the model did not call
        one of the modules."""
        try:
            return {**self._taps.take(), **{name: taps.take() for name, taps in self._attention.items()}}
        except (RuntimeError, KeyError) as error:
            raise TrainError(f"objective: {error} It cannot be matched.") from error

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For a forward whose inner states nobody reads."""
        for taps in (self._taps, *self._attention.values()):
            taps.recording = False
        try:
            yield
        finally:
            for taps in (self._taps, *self._attention.values()):
                taps.recording = True

    def close(self) -> None:
        """Remove the hooks."""
        for taps in (self._taps, *self._attention.values()):
            taps.detach()


def inner_of(outputs: Iterable[str]) -> tuple[str, ...]:
    """Those of an objective's outputs that are inner states."""
    return tuple(name for name in outputs if is_inner(name))
