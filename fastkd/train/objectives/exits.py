"""ExitKD: early exits of a student, which learn from its own last layer (deep-to-shallow self-distillation)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...capture.answers import targets_of
from ...errors import TrainError
from ...kernels import SparseTargets, TopKConfig
from ...models.module import detached
from ...models.protocol import Output
from ...stream.batch import AnyBatch, MicroBatch

Read = Callable[[AnyBatch, Tensor, Output], Output]
"""From a micro-batch, the state `[B, L, D]` that enters a layer, and the output of the whole model in the same forward,
to the output of a model that ends before that layer: by the model's own final norm and LM head, with gradients."""


class ExitKD:
    """Cross-entropy of early exits with the labels, and their divergence from the last layer's answers, which are
    detached: "Be Your Own Teacher", Zhang et al. 2019, without its adapters: all exits share the final norm and the LM
    head, whose gradients count.

    exits: the numbers of layers, from 1; exit 6 is the model's first 6 layers. read: see `Read`.
    loss: of an exit, a `TokenKD`: alpha is the weight of the labels. targets: what is kept of the last layer's answers,
        made from the states of the same forward. vocab_size: of the student.

    The loss is the mean over exits. Parts: exit6/hard, exit6/soft, ...
    """

    def __init__(self, exits: Sequence[int], read: Read, loss: Any, targets: TopKConfig, vocab_size: int) -> None:
        if not exits or len(set(exits)) < len(exits):
            raise TrainError(f"exits: got {', '.join(map(str, exits)) or 'none'}; expected some layers, each once.")
        self.exits, self.read, self.loss, self.targets = tuple(exits), read, loss, targets
        self._vocab_size = vocab_size
        self.signals = ("labels", "targets")
        self.reads_answers = False  # of the targets, the index alone
        self.outputs = ("output", *(state_name(layer) for layer in exits))

    def schedule(self, step: int, steps: int) -> dict[str, float]:
        return {}

    def losses(
        self, batch: AnyBatch, outputs: Mapping[str, Any], *, num_items: int | Tensor | None = None, **scheduled: Any
    ) -> dict[str, Tensor]:
        output: Output = outputs["output"]
        own = replace(batch, targets=self._answers(batch, output))
        found = {
            layer: self.loss.losses(
                own, {"output": self.read(batch, outputs[state_name(layer)], output)}, num_items=num_items
            )
            for layer in self.exits
        }
        parts = {f"exit{n}/{name}": one[name] for n, one in found.items() for name in ("hard", "soft")}
        return {"loss": torch.stack([one["loss"] for one in found.values()]).mean(), **parts}

    @torch.no_grad()
    def _answers(self, batch: AnyBatch, output: Output) -> SparseTargets:
        """The targets of the last layer at the positions that count."""
        index = batch.targets.index
        assert index is not None
        numbers = _numbers(batch, index)
        made = targets_of(detached(output), index, numbers, self.targets, batch.labels.shape, self._vocab_size)
        return replace(made, index=index)

    def describe(self) -> dict[str, Any]:
        return {"exits": list(self.exits), "loss": self.loss.describe()}


def state_name(layer: int) -> str:
    """The output that an exit reads: what enters a layer."""
    return f"state:{layer}"


def _numbers(batch: AnyBatch, index: Tensor) -> Tensor:
    """Numbers that seed the draws, `[m]`: those of the rows, or else such as follow from tokens and position, so that
    draws do not depend on the division into micro-batches."""
    if (rows := batch.signals.get("rows/numbers")) is not None:
        numbers: Tensor = rows.numbers
        return numbers
    labels = batch.labels.flatten()[index]
    if not isinstance(batch, MicroBatch):
        return labels
    return (batch.position_ids.flatten()[index] << 40) + (batch.input_ids.flatten()[index] << 20) + labels
