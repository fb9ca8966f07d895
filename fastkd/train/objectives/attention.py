"""AttentionKD and RelationKD: attention maps, or relations of queries, keys and values, of one layer each."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...cache.errors import type_name
from ...errors import TrainError
from ...kernels import AttentionBlock, KDError, QueriesKeysValues, find_feature_loss
from ...stream.batch import AnyBatch, MicroBatch
from .rows import count_of, segments_of


class AttentionKD(nn.Module):
    """A loss between the attention of a layer of the student and that of a layer of its teacher.

    feature: the state that enters the teacher's layer, by its name in the cache; of all positions, since a map is over
        all positions of a segment. output: the student's, "attention:LAYER".
    block: the teacher's `AttentionBlock`, with which queries, keys and values follow from the state.
    loss: one of attention in `kernels/features/losses`.

    It has no projector: maps and relations are of positions, whatever the widths. Segments never attend to one another.
    """

    def __init__(self, feature: str, output: str, block: AttentionBlock, loss: str = "attention") -> None:
        super().__init__()
        try:
            self._loss = find_feature_loss(loss)
        except KDError as error:
            raise TrainError(str(error)) from error
        if self._loss.inputs != "attention":
            raise TrainError(f"AttentionKD: got the loss {loss!r}, of {self._loss.inputs}; expected one of attention.")
        self.feature, self.output = feature, output
        self._block = block
        self.signals, self.outputs = (f"features/{feature}",), (output,)

    def schedule(self, step: int, steps: int) -> dict[str, float]:
        return {}

    def losses(
        self, batch: AnyBatch, outputs: Mapping[str, Any], *, num_items: int | Tensor | None = None, **scheduled: Any
    ) -> dict[str, Tensor]:
        """num_items is that of the targets: the sum is divided by the feature's own count (`AnyBatch.counts`)."""
        if not isinstance(batch, MicroBatch):
            raise TrainError(f"AttentionKD: got {type_name(batch)}; expected micro-batches of text.")
        targets, whole = batch.features[self.feature], outputs[self.output]
        assert isinstance(whole, QueriesKeysValues)
        index = targets.index
        some = slice(None) if index is None or len(index) == len(whole.queries) else index
        values = None if whole.values is None else whole.values[some]
        student = whole._replace(queries=whole.queries[some], keys=whole.keys[some], values=values)
        with torch.no_grad():
            if self._block.device != batch.device:
                self._block = self._block.to(batch.device)
            teacher = self._block.queries_keys_values(targets, batch.position_ids.flatten()[some])
        count = count_of(batch, self.signals[0])
        return {"loss": self._loss.loss(student, teacher, count, segments=segments_of(batch, index))}

    def describe(self) -> dict[str, Any]:
        return {"feature": self.feature, "output": self.output, "loss": self._loss.name}


class RelationKD(AttentionKD):
    """Relations among queries, among keys and among values (MiniLMv2, Wang et al. 2021); see `AttentionKD`."""

    def __init__(self, feature: str, output: str, block: AttentionBlock, loss: str = "relation") -> None:
        super().__init__(feature, output, block, loss)
