"""`Runtime`: an exported model that runs; and what is made of one: a completion, and the function for `evaluate`."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ExportError
from .segments import segments_of

Floats = NDArray[np.float32]


@runtime_checkable
class Runtime(Protocol):
    """A model in the runtime of its format, with NumPy arrays in and out.

    name: of the runtime, with its version ("onnxruntime 1.32.0"). Of a classifier, `prefill` and `decode` are not
    called.
    """

    name: str

    def logits(self, inputs: NDArray[Any]) -> Floats:
        """Logits `[B, L, V]` of ids `[B, L]` int64, or `[B, V]` of examples `[B, ...]`, of any batch and length."""

    def prefill(self, ids: NDArray[np.int64]) -> Floats:
        """Begin a sequence: run ids `[1, L]`, and return the logits `[V]` after the last. Its keys and values are kept
        for `decode` where the format has a KV cache."""

    def decode(self, token: int) -> Floats:
        """Append a token to the sequence, and return the logits `[V]` after it."""

    def close(self) -> None:
        """Free what it holds. Called once, at the end."""


def greedy(runtime: Runtime, prompt: Sequence[int], tokens: int, *, end: int | None = None) -> list[int]:
    """The most likely continuation token by token, up to `tokens`, or up to and with the token `end`."""
    if not tokens:
        return []
    found = [int(runtime.prefill(np.asarray([prompt], np.int64)).argmax())]
    while len(found) < tokens and found[-1] != end:
        found.append(int(runtime.decode(found[-1]).argmax()))
    return found


def logits_of(runtime: Runtime, *, longest: int | None = None) -> Callable[[Any], Tensor]:
    """A function for `evaluate`, from a micro-batch to the logits `[m, V]` of the positions that count.

    Each document runs by itself and without pads, as it does in deployment: with activations quantised by their range,
    what else is in a batch would change its logits. Examples run as the batch they are in. In memory at a time: the
    logits of the longest document, and those that are returned. longest: tokens that the model takes; the function
    raises ExportError for a longer document.
    """

    def logits(batch: Any) -> Tensor:
        index = batch.targets.index
        found: list[Tensor] = []
        for inputs, positions in segments_of(batch):
            first, last = torch.searchsorted(index, torch.stack([positions[0], positions[-1] + 1])).tolist()
            if first == last:
                continue
            if longest is not None and inputs.dtype == torch.int64 and inputs.shape[1] > longest:
                raise ExportError(
                    f"cache: got a document of {inputs.shape[1]} tokens; expected at most {longest}, which the student "
                    "takes. Use a cache that was captured with a shorter context."
                )
            answer = torch.from_numpy(np.ascontiguousarray(runtime.logits(inputs.numpy()), np.float32))
            found.append(answer.flatten(0, -2)[index[first:last] - positions[0]])
        return torch.cat(found)

    return logits
