"""Any torch module or callable as a teacher."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..cache.errors import type_name
from ..errors import TeacherError
from ..models.module import failure_on, logits_width, output_of, state_sha256
from ..models.protocol import TopK
from .protocol import Answer


class ModuleTeacher:
    """A `Teacher` that calls a `nn.Module` or a function: it maps token ids `[B, L]` to logits `[B, L, V]`, each
    position's independent of later ones, or examples `[B, ...]` to logits `[B, V]`.

    Instead of a tensor it may return an object with an attribute `logits`, or `Hidden`: hidden states and an LM head,
    so that full logits are never materialized; or `TopK`. A module is put into evaluation mode and stays on its device.

    vocab_size: V; None: determined by running the model on `probe` (a batch of one input), unless it
        returns `TopK`.
    fingerprint: identifies the model. For a module it defaults to its class and the sha256 of its parameters and
        buffers; a function needs one.
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
            raise TeacherError(f"teacher: got {type_name(model)}; expected a module or a callable.")
        if not fingerprint and not isinstance(model, nn.Module):
            raise TeacherError(
                f"fingerprint: got none for {type(model).__name__}, which has no weights to hash. Give a text that "
                "changes whenever its output does: a cache must not be continued with another teacher."
            )
        self.model, self._fingerprint = model, fingerprint
        if isinstance(model, nn.Module):
            model.eval()
            if device is None and (tensors := [*model.parameters(), *model.buffers()]):
                device = tensors[0].device
        self.device = torch.device("cpu" if device is None else device)
        if vocab_size is None and probe is not None:
            with torch.inference_mode():
                answer = self._answer_to(probe.to(self.device))
                vocab_size = None if isinstance(answer, TopK) else logits_width(answer)
        if vocab_size is None or isinstance(vocab_size, bool) or int(vocab_size) < 1:
            raise TeacherError(f"vocab_size: got {vocab_size!r}; expected the width of the teacher's logits.")
        self.vocab_size = int(vocab_size)

    @property
    def fingerprint(self) -> str:
        """Identifies the model in a cache."""
        if not self._fingerprint:
            assert isinstance(self.model, nn.Module)
            self._fingerprint = f"{type(self.model).__name__}, state sha256 {state_sha256(self.model)}"
        return self._fingerprint

    def _answer_to(self, probe: Tensor) -> Answer:
        try:
            value = self.model(probe)
        except Exception as problem:
            raise TeacherError(failure_on(self.model, probe, "teacher", problem)) from problem
        return self._answer(value)

    def __call__(self, inputs: Tensor) -> Answer:
        return self._answer(self.model(inputs))

    def _answer(self, value: Any) -> Answer:
        return value if isinstance(value, TopK) else output_of(value, "teacher", None, TeacherError)
