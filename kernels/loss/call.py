"""One call of a loss, as all implementations receive it: everything but the logits or hidden states."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..targets import FIELDS, TargetsAt, targets_at
from ..treatment import resolve_treatment
from .config import SCHEDULED, LossConfig

CONFIG = {field.name: field.default for field in fields(LossConfig)}


class Call(NamedTuple):
    """The arguments of a loss. P target rows over N positions; P = N unless compact."""

    labels: Tensor | None  # [N]
    mask: Tensor | None  # [N] bool
    weights: Tensor | None  # [N]
    num_items: Tensor | None  # []
    items: int  # of the optimizer step; -1: num_items, or else the counted rows
    ids: Tensor  # [P, K]
    logprobs: Tensor  # [P, K]
    draws: Tensor | None  # [P, K]
    tail: Tensor  # [P, M]
    outcomes: Tensor  # [P] or []
    positions: Tensor | None  # [P]
    temperatures: list[float]  # M
    draw_temperature: float
    vocab_size: int  # the teacher's
    config: LossConfig  # with impl "reference", "torch" or "triton"

    def arguments(self) -> list[Any]:
        """The call as an operator takes it, in the order of SCHEMA. A number that may be a 0-d tensor is passed twice:
        as a float, and as a tensor that wins where it is not None."""
        flat: list[Any] = list(self[:-1])
        for name in CONFIG:
            value = getattr(self.config, name)
            if name in SCHEDULED:
                flat += split(value)
            else:
                flat.append(value if value is None or isinstance(value, (int, str)) else float(value))
        return flat

    @classmethod
    def of(cls, arguments: Sequence[Any]) -> "Call":
        """The call that `arguments` were made of. Its config was checked when the call was made."""
        rest = iter(arguments[len(cls._fields) - 1 :])
        settings = {}
        for name in CONFIG:
            value = next(rest)
            if name in SCHEDULED:
                tensor = next(rest)
                value = value if tensor is None else tensor
            settings[name] = value
        config = object.__new__(LossConfig)
        config.__dict__.update(settings)
        return cls._make([*arguments[: len(cls._fields) - 1], config])

    @property
    def rows(self) -> int:
        """P, the number of target rows."""
        return self.ids.shape[0]

    def numbers(self) -> tuple[float, float]:
        """alpha and T on the host. Reads tensors: not for the Triton path."""
        alpha, t = (float(getattr(self.config, name)) for name in SCHEDULED)
        return alpha, t

    def treatment(self, t: float | None) -> str:
        """The treatment at T; None: "auto" where it depends on T."""
        return resolve_treatment(
            self.config.treatment, t, has_draws=self.draws is not None, draw_temperature=self.draw_temperature,
            divergence=self.config.divergence,
        )  # fmt: skip

    def by_row(self) -> "Call":
        """The same call with labels, mask and weights per target row instead of per position, and no positions."""
        if self.positions is None:
            return self
        names = ("labels", "mask", "weights")
        at: dict[str, Any] = {k: None if (v := getattr(self, k)) is None else v[self.positions] for k in names}
        return self._replace(positions=None, **at)

    def take(self, rows: slice | Tensor) -> "Call":
        """Some rows of a call by row."""
        assert self.positions is None
        names = ("labels", "mask", "weights", *(field.name for field in FIELDS))
        some: dict[str, Any] = {k: v if (v := getattr(self, k)) is None or v.ndim == 0 else v[rows] for k in names}
        return self._replace(**some)

    def counted(self) -> Tensor:
        """Of a call by row: which rows count, bool `[P]`: the label is not `ignore_index` and the mask has them."""
        rows = torch.ones(self.rows, dtype=torch.bool, device=self.ids.device) if self.mask is None else self.mask
        return rows if self.labels is None else rows & (self.labels != self.config.ignore_index)

    def by_row_within(self, positions: int) -> tuple["Call", Tensor]:
        """`by_row` and `counted` without reading any value: a row whose position is outside the batch does not count,
        and has the label, mask and weight of another."""
        if self.positions is None:
            return self, self.counted()
        inside = (self.positions >= 0) & (self.positions < positions)
        call = self._replace(positions=self.positions.clamp(0, max(positions - 1, 0))).by_row()
        return call, call.counted() & inside

    def max_abs_weight(self, positions: int) -> Tensor:
        """The largest magnitude among the weights of the rows that count, at least 1: 0-d float32, on the device."""
        call, counted = self.by_row_within(positions)
        assert call.weights is not None
        # a weight that is not finite makes its own row's loss NaN, and does not concern the others
        weights = call.weights.float().abs().masked_fill(~counted, 0.0).nan_to_num(nan=0.0, posinf=0.0)
        return torch.cat([weights, weights.new_ones(1)]).amax()

    def divisor(self) -> Tensor:
        """Of a call by row: what the sums are divided by, a 0-d float32 tensor; 0 counts as 1."""
        if self.items >= 0:
            return torch.full((), max(self.items, 1), dtype=torch.float32, device=self.ids.device)
        total = self.counted().sum() if self.num_items is None else self.num_items
        return total.to(self.ids.device, torch.float32).clamp(min=1)

    def targets_at(self, t: float, dtype: torch.dtype) -> TargetsAt:
        """The teacher of every target row at T, under the call's treatment."""
        return targets_at(
            self.logprobs,
            self.draws,
            self.tail,
            self.outcomes,
            t,
            self.treatment(t),
            temperatures=tuple(self.temperatures),
            draw_temperature=self.draw_temperature,
            dtype=dtype,
        )


class RowOptions(NamedTuple):
    """What is done with the rows of a call, for `TorchRows` and `TritonRows`.

    upstream: the gradient of the loss `[]`; None: 1. fixed_scale: a factor of the gradient in place of 1/divisor.
    softcap, logit_scale: of an LMHead. want_grad: whether logits become their gradient. what: the logits, in messages.
    """

    upstream: Tensor | None = None
    fixed_scale: float | None = None
    softcap: float | None = None
    logit_scale: float | None = None
    want_grad: bool = True
    what: str = "logits"


def split(value: float | Tensor) -> tuple[float, Tensor | None]:
    """A number, and the tensor that wins over it."""
    return (1.0, value) if isinstance(value, Tensor) else (float(value), None)


def saveable(value: Any) -> Any:
    """A tensor that autograd can save: a copy of one made under torch.inference_mode, which it cannot."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _kind(name: str, default: Any) -> str:
    """A field of LossConfig in an operator's schema."""
    if name in SCHEDULED:
        return f"float {name}, Tensor? {name}_tensor"
    return f"{'float?' if default is None else type(default).__name__} {name}"


_TYPES = "Tensor? Tensor? Tensor? Tensor? int Tensor Tensor Tensor? Tensor Tensor Tensor? float[] float int"
SCHEMA = ", ".join(
    [f"{kind} {name}" for kind, name in zip(_TYPES.split(), Call._fields[:-1], strict=True)]
    + [_kind(name, default) for name, default in CONFIG.items()]
)
