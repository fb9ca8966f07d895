"""ExitKD: early exits of a student, which learn from its own last layer (deep-to-shallow self-distillation)."""

from collections.abc import Callable, Mapping
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
"""From a micro-batch, the state `[B, L, D]` that a layer returns, and the output of the whole model in the same forward
to the output of a model that ends with that layer: by the model's own final norm and LM head, with gradients."""


class ExitKD:
    """Cross-entropy of early exits with the labels, and their divergence from the last layer's answers, which are
    detached: "Be Your Own Teacher", Zhang et al. 2019, without its adapters: all exits share the final norm and the LM
    head, whose gradients count.

    exits: the output of the student that each reads ("module:model.layers.5"), by its number of layers, from 1: exit 6
        is the model's first 6 layers. read: see `Read`.
    loss: of an exit, a `TokenKD`: alpha is the weight of the labels. targets: what is kept of the last layer's answers,
        made from the states of the same forward. vocab_size: of the student.

    The loss is the mean over exits. Parts: exit6/hard, exit6/soft, ...
    """

    def __init__(self, exits: Mapping[int, str], read: Read, loss: Any, targets: TopKConfig, vocab_size: int) -> None:
        if not exits:
            raise TrainError("exits: got none; expected the outputs of some layers.")
        self.exits, self.read, self.loss = dict(exits), read, loss
        self.targets: Any = targets
        self._vocab_size = vocab_size
        self.signals = ("labels", "targets")
        self.reads_answers = False  # of the targets, the index alone
        self.outputs = ("output", *exits.values())

    def schedule(self, step: int, steps: int) -> dict[str, float]:
        return {}

    def losses(
        self, batch: AnyBatch, outputs: Mapping[str, Any], *, num_items: int | Tensor | None = None, **scheduled: Any
    ) -> dict[str, Tensor]:
        output: Output = outputs["output"]
        own = replace(batch, targets=self._answers(batch, output))
        found = {
            layer: self.loss.losses(own, {"output": self.read(batch, outputs[name], output)}, num_items=num_items)
            for layer, name in self.exits.items()
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


def _numbers(batch: AnyBatch, index: Tensor) -> Tensor:
    """Numbers that seed the draws, `[m]`. They follow from tokens and position alone, so that neither the division into
    micro-batches nor whether the batch comes from a cache changes the draws; equal ones do no harm."""
    labels = batch.labels.flatten()[index]
    if not isinstance(batch, MicroBatch):
        return labels
    return (batch.position_ids.flatten()[index] << 40) + (batch.input_ids.flatten()[index] << 20) + labels
