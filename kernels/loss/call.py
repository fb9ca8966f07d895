"""One call of a loss, as all implementations receive it: everything but the logits or hidden states."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..targets import SparseTargets
from ..treatment import resolve_treatment
from ..vocab_parallel import VocabPart, exchange_parts, read_part
from .config import SCHEDULED, LossConfig

T = TypeVar("T")


class Call(NamedTuple):
    """The arguments of a loss. P target rows over N positions; P = N unless compact."""

    labels: Tensor | None  # [N]
    mask: Tensor | None  # [N] bool
    weights: Tensor | None  # [N]
    num_items: Tensor | None  # []
    items: int  # of the optimizer step; -1: num_items, or else the counted rows
    group: str | None  # the process group over which the vocabulary is divided; None: the logits are whole
    vocab_start: int  # this rank's first column; -1: the parts lie in rank order
    targets: SparseTargets  # P rows
    config: LossConfig  # with impl "reference", "torch" or "triton"

    def arguments(self) -> list[Any]:
        """The call as an operator takes it, in the order of SCHEMA. A number that may be a 0-d tensor is passed twice:
        as a float, and as a tensor that wins where it is not None."""
        flat: list[Any] = [*self[:-2], *(getattr(self.targets, name) for name in _TARGETS)]
        for name in _CONFIG:
            value = getattr(self.config, name)
            if name in SCHEDULED:
                flat += split(value)
            else:
                flat.append(value if value is None or isinstance(value, (int, str)) else float(value))
        return flat

    @classmethod
    def of(cls, arguments: Sequence[Any]) -> "Call":
        """The call that `arguments` were made of. Its parts were checked when the call was made."""
        rest = iter(arguments)
        rows = [next(rest) for _ in cls._fields[:-2]]
        targets = {name: next(rest) for name in _TARGETS}
        targets["temperatures"] = tuple(targets["temperatures"])
        config: dict[str, Any] = {}
        for name in _CONFIG:
            value, tensor = next(rest), next(rest) if name in SCHEDULED else None
            config[name] = value if tensor is None else tensor
        return cls._make([*rows, _unchecked(SparseTargets, targets), _unchecked(LossConfig, config)])

    @property
    def rows(self) -> int:
        """P, the number of target rows."""
        return len(self.targets)

    def vocab_part(self, width: int, options: "RowOptions") -> VocabPart | None:
        """This rank's part of a divided vocabulary, of which it holds `width` columns. All ranks of the group call it.
        Reads a tensor: not for the Triton path."""
        if self.group is None:
            return None
        return read_part(self.group, self.exchange_parts(width, options), self.targets.vocab_size, options.what)

    def exchange_parts(self, width: int, options: "RowOptions") -> Tensor:
        """`vocab_parallel.exchange_parts` of this call's group: its settings, and which tensors it has."""
        assert self.group is not None
        known = [x if x is None or isinstance(x, (int, float, str, tuple)) else "tensor" for x in self.arguments()]
        for name in ("group", "vocab_start"):  # each rank's own
            known[Call._fields.index(name)] = None
        shapes = tuple(self.targets.ids.shape), self.targets.temperatures
        numbers = [x if x is None or isinstance(x, (int, float)) else "tensor" for x in options[:-1]]
        settings = repr((known, shapes, numbers))
        return exchange_parts(self.group, width, self.vocab_start, self.targets.device, settings)

    def numbers(self) -> tuple[float, float]:
        """alpha and T on the host. Reads tensors: not for the Triton path."""
        alpha, t = (float(getattr(self.config, name)) for name in SCHEDULED)
        return alpha, t

    def treatment(self, t: float | None) -> str:
        """The treatment at T; None: "auto" where it depends on T."""
        return resolve_treatment(
            self.config.treatment, t, has_draws=self.targets.draws is not None,
            draw_temperature=self.targets.draw_temperature, divergence=self.config.divergence,
        )  # fmt: skip

    def take(self, rows: slice | Tensor) -> "Call":
        """Some rows of a call by row."""
        return self._replace(targets=self.targets.take(rows), **self.at(rows))

    def at(self, positions: slice | Tensor) -> dict[str, Any]:
        """labels, mask and weights of some positions."""
        names = ("labels", "mask", "weights")
        return {name: None if (x := getattr(self, name)) is None else x[positions] for name in names}

    def by_row(self, positions: int) -> tuple["Call", Tensor]:
        """The call with labels, mask and weights per target row instead of per position, and no index; and which rows
        count, bool `[P]`: their label is not `ignore_index`, and the mask has them.

        Reads no value: a row whose position is outside the batch does not count, and has the label, mask and weight of
        another.
        """
        call, index = self, self.targets.index
        counted = torch.ones(self.rows, dtype=torch.bool, device=self.targets.device)
        if index is not None:
            counted, somewhere = (index >= 0) & (index < positions), index.clamp(0, max(positions - 1, 0))
            call = self._replace(targets=replace(self.targets, index=None), **self.at(somewhere))
        if call.mask is not None:
            counted = counted & call.mask
        return call, counted if call.labels is None else counted & (call.labels != self.config.ignore_index)

    def max_abs_weight(self, positions: int) -> Tensor:
        """The largest magnitude among the weights of the rows that count, at least 1: 0-d float32, on the device."""
        call, counted = self.by_row(positions)
        assert call.weights is not None
        # a weight that is not finite makes its own row's loss NaN, and does not concern the others
        weights = call.weights.float().abs().masked_fill(~counted, 0.0).nan_to_num(nan=0.0, posinf=0.0)
        return torch.cat([weights, weights.new_ones(1)]).amax()

    def divisor(self, counted: Tensor) -> Tensor:
        """What the sums are divided by, a 0-d float32 tensor; 0 counts as 1."""
        if self.items >= 0:
            return torch.full((), max(self.items, 1), dtype=torch.float32, device=self.targets.device)
        total = counted.sum() if self.num_items is None else self.num_items
        return total.to(self.targets.device, torch.float32).clamp(min=1)


class RowOptions(NamedTuple):
    """What is done with the rows of a call, for `TorchRows` and `TritonRows`.

    upstream: the gradient of the loss `[]`; None: 1. fixed_scale: a factor of the gradient in place of 1/divisor.
    softcap, logit_scale: of an LMHead. want_grad: whether logits become their gradient. chunk: how many rows come at
    once, 0 for all. what: the logits, in messages.
    """

    upstream: Tensor | None = None
    fixed_scale: float | None = None
    softcap: float | None = None
    logit_scale: float | None = None
    want_grad: bool = True
    chunk: int = 0
    what: str = "logits"


def split(value: float | Tensor) -> tuple[float, Tensor | None]:
    """A number, and the tensor that wins over it."""
    return (1.0, value) if isinstance(value, Tensor) else (float(value), None)


def saveable(value: Any) -> Any:
    """A tensor that autograd can save: a copy of one made under torch.inference_mode, which it cannot."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _unchecked(kind: type[T], values: dict[str, Any]) -> T:
    """An object of a frozen dataclass, with values that were checked before."""
    made = object.__new__(kind)
    made.__dict__.update(values)
    return made


# the names and types of the fields as an operator's schema has them
_CONFIG = {field.name: field.default for field in fields(LossConfig)}
_TARGETS = {
    "ids": "Tensor", "logprobs": "Tensor", "tail": "Tensor", "outcomes": "Tensor", "draws": "Tensor?",
    "index": "Tensor?", "vocab_size": "int", "temperatures": "float[]", "draw_temperature": "float",
}  # fmt: skip
SCHEMA = ", ".join(
    [
        "Tensor? labels, Tensor? mask, Tensor? weights, Tensor? num_items, int items, str? group, int vocab_start",
        *(f"{kind} {name}" for name, kind in _TARGETS.items()),
        *(
            f"float {name}, Tensor? {name}_tensor"
            if name in SCHEDULED
            else f"{'float?' if default is None else type(default).__name__} {name}"
            for name, default in _CONFIG.items()
        ),
    ]
)
