"""One call of a loss, as all implementations receive it: everything beside the logits, flat, ready for an operator."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..targets import TargetsAt, targets_at

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "tvd")
IMPLEMENTATIONS = ("auto", "reference", "torch", "triton")


class Call(NamedTuple):
    """The arguments of a loss in the order of `SCHEMA`. P target rows over N positions; P = N unless compact.

    A number that may be a 0-d tensor is passed twice: as a float, and as a tensor that wins where it is not None.
    """

    labels: Tensor | None  # [N]
    mask: Tensor | None  # [N] bool
    weights: Tensor | None  # [N]
    num_items: Tensor | None  # []
    items: int  # of the optimizer step; -1: num_items, or else the counted rows
    alpha: float
    alpha_tensor: Tensor | None
    temperature: float
    temperature_tensor: Tensor | None
    ids: Tensor  # [P, K]
    logprobs: Tensor  # [P, K]
    draws: Tensor | None  # [P, K]
    tail: Tensor  # [P, M]
    outcomes: Tensor  # [P] or []
    positions: Tensor | None  # [P]
    temperatures: list[float]  # M
    draw_temperature: float
    vocab_size: int  # the teacher's
    divergence: str
    treatment: str  # auto only where it depends on the temperature
    mix: float  # beta of jsd, skew of skew_kl
    ignore_index: int
    impl: str  # "reference", "torch" or "triton"

    @property
    def rows(self) -> int:
        """P, the number of target rows."""
        return self.ids.shape[0]

    def alpha_now(self) -> float:
        """alpha on the host. Reads a tensor: not for the Triton path."""
        return self.alpha if self.alpha_tensor is None else float(self.alpha_tensor)

    def temperature_now(self) -> float:
        """The temperature on the host. Reads a tensor: not for the Triton path."""
        return self.temperature if self.temperature_tensor is None else float(self.temperature_tensor)

    def by_row(self) -> "Call":
        """The same call with labels, mask and weights a target row, not a position, and no positions."""
        if self.positions is None:
            return self
        names = ("labels", "mask", "weights")
        at: dict[str, Any] = {k: None if (v := getattr(self, k)) is None else v[self.positions] for k in names}
        return self._replace(positions=None, **at)

    def take(self, rows: slice | Tensor) -> "Call":
        """A call by row, for some of its rows."""
        assert self.positions is None
        names = ("labels", "mask", "weights", "ids", "logprobs", "draws", "tail", "outcomes")
        some: dict[str, Any] = {k: v if (v := getattr(self, k)) is None or v.ndim == 0 else v[rows] for k in names}
        return self._replace(**some)

    def counted(self) -> Tensor:
        """Of a call by row: which rows count, bool `[P]`: the label is not `ignore_index` and the mask has them."""
        rows = torch.ones(self.rows, dtype=torch.bool, device=self.ids.device) if self.mask is None else self.mask
        return rows if self.labels is None else rows & (self.labels != self.ignore_index)

    def by_row_within(self, positions: int) -> tuple["Call", Tensor]:
        """`by_row` and `counted` without a look at any value: a row outside the batch reads another's, and does not
        count."""
        if self.positions is None:
            return self, self.counted()
        inside = (self.positions >= 0) & (self.positions < positions)
        call = self._replace(positions=self.positions.clamp(0, max(positions - 1, 0))).by_row()
        return call, call.counted() & inside

    def heaviest(self, positions: int) -> Tensor:
        """The largest magnitude among the weights of the rows that count, at least 1: 0-d float32, on the device."""
        call, counted = self.by_row_within(positions)
        assert call.weights is not None
        # what is not finite makes its own row's loss NaN and says nothing about the others
        weights = call.weights.float().abs().masked_fill(~counted, 0.0).nan_to_num(nan=0.0, posinf=0.0)
        return torch.cat([weights, weights.new_ones(1)]).amax()

    def divisor(self) -> Tensor:
        """Of a call by row: what the sums are divided by, a 0-d float32 tensor; 0 counts as 1."""
        if self.items >= 0:
            return torch.full((), max(self.items, 1), dtype=torch.float32, device=self.ids.device)
        total = self.counted().sum() if self.num_items is None else self.num_items
        return total.to(self.ids.device, torch.float32).clamp(min=1)

    def targets_at(self, temperature: float, dtype: torch.dtype) -> TargetsAt:
        """The teacher of every target row at a temperature, under the call's treatment."""
        return targets_at(
            self.logprobs,
            self.draws,
            self.tail,
            self.outcomes,
            temperatures=tuple(self.temperatures),
            draw_temperature=self.draw_temperature,
            temperature=temperature,
            treatment=self.treatment,
            dtype=dtype,
        )


def saveable(value: Any) -> Any:
    """A tensor that autograd can save: a copy of one made under torch.inference_mode, which it cannot."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


_TYPES = (
    "Tensor? Tensor? Tensor? Tensor? int float Tensor? float Tensor? "
    "Tensor Tensor Tensor? Tensor Tensor Tensor? float[] float int str str float int str"
)
SCHEMA = ", ".join(f"{kind} {name}" for kind, name in zip(_TYPES.split(), Call._fields, strict=True))
