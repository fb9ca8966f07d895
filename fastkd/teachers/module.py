"""A module of one's own, or any callable, as a teacher."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TeacherError
from ..kernels.lm_head import LMHead
from ..models.protocol import Hidden, Logits, Output


class ModuleTeacher:
    """A `nn.Module`, or a callable, that maps inputs to logits: of token ids `[B, L]` to `[B, L, V]`, where what is
    said at a position must not depend on later ones; or of examples `[B, ...]` to `[B, V]`.

    Instead of logits it may return anything with an attribute `logits`, or a `Hidden` (states and a head, which spares
    the logits their memory). A module is put into evaluation mode, and left where it is.

    vocab_size: the width of its logits. Where None, it is run on `probe` (one input, as a batch) to find out.
    fingerprint: says which model it is. Of a module it defaults to its class and the sha256 of all its parameters and
        buffers; a callable needs one.
    """

    max_positions: int | None = None

    def __init__(
        self,
        model: Callable[[Tensor], Any],
        *,
        vocab_size: int | None = None,
        probe: Tensor | None = None,
        fingerprint: str = "",
        device: torch.device | str | None = None,
    ) -> None:
        if not callable(model):
            raise TeacherError(f"teacher: got {type(model).__name__}; expected a module or a callable.")
        if not fingerprint and not isinstance(model, nn.Module):
            raise TeacherError(
                f"fingerprint: found none with {type(model).__name__}, which has no weights to hash. Give a text that "
                "changes whenever what it says does: a cache must not be continued with another teacher."
            )
        self._model, self._fingerprint = model, fingerprint
        found = next((t.device for t in _tensors(model)), torch.device("cpu"))
        self.device = torch.device(device) if device is not None else found
        if isinstance(model, nn.Module):
            model.eval()
        if vocab_size is None and probe is not None:
            vocab_size = self._width(probe.to(self.device))
        if vocab_size is None or isinstance(vocab_size, bool) or int(vocab_size) < 1:
            raise TeacherError(f"vocab_size: got {vocab_size!r}; expected the width of the teacher's logits.")
        self.vocab_size = int(vocab_size)

    @property
    def fingerprint(self) -> str:
        """What the cache remembers of it."""
        if not self._fingerprint:
            assert isinstance(self._model, nn.Module)
            self._fingerprint = f"{type(self._model).__name__}, state sha256 {state_digest(self._model)}"
        return self._fingerprint

    def __call__(self, inputs: Tensor) -> Output:
        found = self._model(inputs)
        if isinstance(found, (Hidden, Logits)):
            return found
        logits = found if isinstance(found, Tensor) else getattr(found, "logits", None)
        if not isinstance(logits, Tensor) or logits.ndim < 2 or not logits.is_floating_point():
            raise TeacherError(
                f"teacher: got {type(found).__name__} from the model; logits, an object with `logits`, or "
                "fastkd.teacher.Hidden is needed."
            )
        return Logits(logits)

    @torch.inference_mode()
    def _width(self, probe: Tensor) -> int:
        output = self(probe)
        if isinstance(output, Logits):
            return int(output.values.shape[-1])
        if isinstance(output.head, LMHead):
            return int(output.head.weight.shape[0])
        return int(output.head(output.states.flatten(0, -2)[:1]).shape[-1])


def state_digest(module: nn.Module) -> str:
    """sha256 of a module's parameters and buffers: names, types, shapes and bytes."""
    whole = hashlib.sha256()
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, tensor in sorted(tensors.items()):
        plain = tensor.detach().cpu().contiguous()
        whole.update(f"{name}:{plain.dtype}:{tuple(plain.shape)};".encode())
        whole.update(plain.flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()


def _tensors(model: Any) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
