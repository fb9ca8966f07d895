"""HiddenKD: states or feature maps of a student against those of its teacher."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor

from ...errors import TrainError
from ...kernels import KDError, find_feature_loss
from ...stream.batch import AnyBatch
from ...utils.distributed import Processes, is_dtensor
from .projector import LeastSquares, LinearProjector, unit
from .rows import count_of, rows_at, segments_of


class HiddenKD(nn.Module):
    """A loss between an inner state of the student and a feature of the cache.

    feature: its name. output: the student's, "state:LAYER" or "module:NAME". loss: one of states or of maps in
        `kernels/features/losses`.
    projector: from the student's states to the teacher's coordinates (see `projector.py`); None: the student's states,
        divided by their root mean square, are compared as they are, which takes equal widths where the loss compares
        component by component. shape: of the feature's value, `(C, H, W)` or `(H, W)`, for losses of maps.
    fit: whether a training begins with the linear projector that fits its first batch best.

    States are compared divided by their root mean square, in the coordinates in which the teacher's are coded. These
    are a rotation of the states, which the projector learns with the rest.
    """

    def __init__(
        self,
        feature: str,
        output: str,
        loss: str = "mse",
        *,
        projector: nn.Module | None = None,
        shape: tuple[int, ...] | None = None,
        fit: bool = False,
    ) -> None:
        super().__init__()
        try:
            self._loss = find_feature_loss(loss)
        except KDError as error:
            raise TrainError(str(error)) from error
        if self._loss.inputs == "attention":
            raise TrainError(f"HiddenKD: got the loss {loss!r}, of attention; expected one of states or of maps.")
        self.feature, self.output, self.shape = feature, output, shape
        self.projector = projector
        self.fit = fit and isinstance(projector, LinearProjector)
        self._sums: LeastSquares | None = None
        self.signals, self.outputs = (f"features/{feature}",), (output,)

    def schedule(self, step: int, steps: int) -> dict[str, float]:
        return {}

    def losses(
        self, batch: AnyBatch, outputs: Mapping[str, Any], *, num_items: int | Tensor | None = None, **scheduled: Any
    ) -> dict[str, Tensor]:
        """num_items is that of the targets: the sum is divided by the feature's own count (`AnyBatch.counts`)."""
        targets, value = batch.features[self.feature], outputs[self.output]
        count = count_of(batch, self.signals[0])
        if self._loss.inputs == "maps":
            maps = value if self.projector is None else self.projector(value)
            if self.projector is None and self._loss.projector:
                maps = torch.einsum("bchw,ck->bkhw", value, targets.basis.to(value.dtype))
            return {"loss": self._loss.loss(maps, targets, count, shape=self.shape)}
        states = rows_at(value, targets.index)
        if self._sums is not None:
            self._sums.add(states, targets.units() if self._loss.dense else targets.coordinates())
        if self.projector is not None:
            states = self.projector(states)
        elif self._loss.projector:
            states = unit(states)
            if not self._loss.dense:  # into the coordinates: the same rotation as the teacher's
                states = states @ targets.basis.to(states.dtype)
        options = {"segments": segments_of(batch, targets.index)} if self._loss.segments else {}
        return {"loss": self._loss.loss(states, targets, count, **options)}

    def begin_fit(self, device: torch.device) -> None:
        """From now on, the states that are compared are added up, until `end_fit`."""
        assert isinstance(self.projector, LinearProjector)
        target_width, width = self.projector.weight.shape
        self._sums = LeastSquares(width, target_width, device)

    @torch.no_grad()
    def end_fit(self, processes: Processes) -> None:
        """Set the projector to what fits these states best, those of all processes together."""
        assert isinstance(self.projector, LinearProjector)
        assert self._sums is not None
        processes.sum_(self._sums.sums)
        for parameter, value in zip((self.projector.weight, self.projector.bias), self._sums.solve(), strict=True):
            # the first process's: others may round otherwise
            whole = processes.sum_((value if processes.first else torch.zeros_like(value)).to(parameter.dtype))
            if is_dtensor(parameter):
                whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
            parameter.copy_(whole)
        self._sums = None

    def describe(self) -> dict[str, Any]:
        projector = None if self.projector is None else type(self.projector).__name__
        return {"feature": self.feature, "output": self.output, "loss": self._loss.name, "projector": projector,
                "fit": self.fit}  # fmt: skip
