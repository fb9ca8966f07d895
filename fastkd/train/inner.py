"""Inner states of a student as outputs that objectives read by name.

"state:16": what enters layer 16, counted from 0 (the number of layers: what enters the final norm), `[B, L, D]`.
"module:NAME": the output of a module, such as a map `[B, C, H, W]`.
"attention:16": `QueriesKeysValues` of layer 16 at all B·L positions (`models/attention.py`).
All carry gradients. They are recorded by forward hooks (`models/taps.py`), so nothing is asked of the model, and no
other state is kept.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..errors import TrainError
from ..models.attention import LayerAttention, read_attention
from ..models.taps import Taps, layers_of

ATTENTION = "attention:"
KINDS = ("state", "module", "attention")


def is_inner(name: str) -> bool:
    """Whether an output's name is that of an inner state."""
    kind, _, rest = name.partition(":")
    return kind in KINDS and bool(rest)


class InnerOutputs:
    """Records inner states in every forward of a model, from now on. Raises TrainError for a layer or a module that it
    does not have, and for attention that cannot be recomputed.

    context: positions in the longest segment, which a layer has to attend to as a whole; None: any number. With
    compiled layers, make it before the first forward.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], context: int | None = None) -> None:
        names = tuple(names)
        self._attention = {name: _attention(model, name, context) for name in names if name.startswith(ATTENTION)}
        parts = [f"module:{path}" for one in self._attention.values() for path in one.outputs]
        self._names = [name for name in names if name not in self._attention]
        self._taps = Taps(model, dict.fromkeys([*self._names, *parts]), TrainError).attach()

    def take(self, position_ids: Tensor | None = None) -> dict[str, Any]:
        """The states of the last forward by name, which are then forgotten. position_ids `[B, L]`: of its positions,
        for attention. Raises TrainError if the model did not call one of the modules."""
        try:
            values = self._taps.take()
        except RuntimeError as error:
            raise TrainError(f"objective: {error} It cannot be matched.") from error
        found: dict[str, Any] = {name: values[name] for name in self._names}
        if self._attention:
            outputs = {name.removeprefix("module:"): value for name, value in values.items()}
            assert position_ids is not None
            found |= {name: one.of_outputs(outputs, position_ids) for name, one in self._attention.items()}
        return found

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For a forward whose inner states nobody reads."""
        self._taps.recording = False
        try:
            yield
        finally:
            self._taps.recording = True

    def close(self) -> None:
        """Remove the hooks."""
        self._taps.detach()


def _attention(model: nn.Module, name: str, context: int | None) -> LayerAttention:
    """The attention of a layer, as its modules compute it now: proven on a few tokens."""
    layer, layers = name.removeprefix(ATTENTION), len(layers_of(model))
    if not layer.isdecimal() or int(layer) >= layers:
        raise TrainError(f"{name}: got a layer that {type(model).__name__} lacks; it has {layers}, from 0 on.")
    training = model.training
    try:
        return read_attention(model.eval(), int(layer), context=context, error=TrainError)
    finally:
        model.train(training)


def inner_of(outputs: Iterable[str]) -> tuple[str, ...]:
    """Those of an objective's outputs that are inner states."""
    return tuple(name for name in outputs if is_inner(name))
