"""SparseTargets: a teacher's soft targets, a few numbers a position; its distribution at any temperature."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import KDError, type_name
from .fields import Field, TensorFields, on_device
from .tail import check_temperature, tail_weights
from .treatment import resolve_treatment

_INF = float("inf")


FIELDS = (
    Field("ids", torch.int32, 0, "NK"),
    Field("logprobs", torch.float32, -_INF, "NK"),
    Field("tail", torch.float32, -_INF, "NM"),
    Field("outcomes", torch.int32, 0, "N", scalar=True),
    Field("draws", torch.int32, 0, "NK", optional=True),
)
"""The tensors of `SparseTargets` that a cache stores, under the same names. Dimensions: N rows, K entries a row, M
temperatures."""
INDEX = Field("index", torch.int64, 0, "N", optional=True)


def _sizes(field: Field, rows: int, width: int, temperatures: int) -> tuple[int, ...]:
    sizes = {"N": rows, "K": width, "M": temperatures}
    return tuple(sizes[letter] for letter in field.shape)


class TargetsAt(NamedTuple):
    """The teacher's distribution at one temperature under one treatment: what a loss computes with.

    log_q `[N, K]`: true log-probability of each entry of the support S; −inf for an entry outside S.
    weights `[N, K]`: the weight of each entry's term; equal to q except under `sampled`. 0 outside S.
    log_q_tail `[N]`: log-probability of everything outside S as one outcome; −inf where nothing is. NaN in a row that
        does not fit the treatment (draws alone, under `bucket` or `renormalize`).
    """

    log_q: Tensor
    weights: Tensor
    log_q_tail: Tensor


@dataclass(frozen=True, eq=False)
class SparseTargets(TensorFields):
    """Sparse soft targets of N positions: K entries each, and the log-partition of everything else.

    ids `[N, K]` int: token ids; first the top-k entries (exact, best first), then the drawn ones (best first). Unused
        entries come last: id 0, logprob −inf, draws 0.
    logprobs `[N, K]` float: natural log of the teacher's probability at T = 1 under its full softmax.
    tail `[N, M]` float: `log Σ p_j^(1/T_m)` over all tokens j but the top-k entries, for each stored temperature.
    outcomes `[N]` or `[]` int: finite teacher logits that are not top-k entries.
    draws `[N, K]` int or None: 0 for a top-k entry; c >= 1: drawn c times, with replacement, from the tail's softmax
        at `draw_temperature`.
    temperatures: the stored temperatures, M distinct numbers with 1.0 among them.
    vocab_size: outputs of the teacher's LM head.
    index `[N]` int64 or None: for compact targets, the (flattened) position of each row; positions without a row do not
        count in a loss. Without it, row i is position i.

    Raises KDError if shapes or types do not fit together. The values inside the tensors are checked where they are
    used.
    """

    ids: Tensor
    logprobs: Tensor
    tail: Tensor
    outcomes: Tensor
    vocab_size: int
    draws: Tensor | None = None
    temperatures: tuple[float, ...] = (1.0,)
    draw_temperature: float = 1.0
    index: Tensor | None = None

    FIELDS: ClassVar[tuple[Field, ...]] = (*FIELDS, INDEX)
    NAME: ClassVar[str] = "targets"

    def __post_init__(self) -> None:
        if isinstance(self.outcomes, Integral) and isinstance(self.ids, Tensor):  # one number for all rows
            object.__setattr__(self, "outcomes", torch.as_tensor(int(self.outcomes), device=self.ids.device))
        self._check_tensors()
        if self.ids.ndim != 2:
            raise KDError(f"targets.ids: got shape {tuple(self.ids.shape)}; expected (positions, entries).")
        if not isinstance(self.temperatures, Iterable) or not all(isinstance(t, Real) for t in self.temperatures):
            raise KDError(f"temperatures: got {self.temperatures!r}; expected numbers.")
        object.__setattr__(self, "temperatures", tuple(float(t) for t in self.temperatures))
        self._check_fields({"N": self.ids.shape[0], "K": self.ids.shape[1], "M": len(self.temperatures)})
        grid = self.temperatures
        # compared one by one: torch.compile may hold them as symbols, of which it knows neither `in` nor sets
        distinct = all(s != t for i, t in enumerate(grid) for s in grid[:i])
        if not any(t == 1.0 for t in grid) or not distinct or not all(0 < t < _INF for t in grid):
            raise KDError(f"temperatures: got {grid}; expected distinct positive numbers with 1.0 among them.")
        if not isinstance(self.draw_temperature, Real) or not 0 < self.draw_temperature < _INF:
            raise KDError(f"draw_temperature: got {self.draw_temperature!r}; expected a positive number.")
        if not isinstance(self.vocab_size, Integral) or self.vocab_size < 1:
            raise KDError(f"vocab_size: got {self.vocab_size!r}; expected a positive integer.")
        # numpy's numbers become Python's: an operator takes no others
        object.__setattr__(self, "draw_temperature", float(self.draw_temperature))
        object.__setattr__(self, "vocab_size", int(self.vocab_size))

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def width(self) -> int:
        """K, the entries a row."""
        return self.ids.shape[1]

    def take(self, rows: slice | Tensor) -> "SparseTargets":
        """The targets of some rows: a slice, a boolean mask or a tensor of row numbers. `targets[rows]` is the same."""
        if not isinstance(rows, (slice, Tensor)):
            raise KDError(f"targets[...]: got {type_name(rows)}; expected a slice, a mask or a tensor of rows.")
        return self.map(lambda x: x if x.ndim == 0 else x[rows])

    __getitem__ = take

    @classmethod
    def empty(
        cls,
        rows: int,
        width: int,
        *,
        vocab_size: int,
        temperatures: Sequence[float] = (1.0,),
        draws: bool = False,
        draw_temperature: float = 1.0,
        device: torch.device | str | None = None,
        pin_memory: bool = False,
        fill: bool = True,
    ) -> "SparseTargets":
        """Targets of `rows` rows without entries, to be written into. fill=False leaves their values uninitialised."""
        columns: dict[str, Any] = {}
        for field in FIELDS:
            if field.optional and not draws:
                continue
            sizes = _sizes(field, rows, width, len(temperatures))
            column = columns[field.name] = torch.empty(sizes, dtype=field.dtype, device=device, pin_memory=pin_memory)
            if fill:
                column.fill_(field.fill)
        return cls(
            **columns,
            vocab_size=vocab_size,
            temperatures=tuple(temperatures),
            draw_temperature=draw_temperature,
        )

    @classmethod
    def cat(cls, parts: Sequence["SparseTargets"]) -> "SparseTargets":
        """The rows of several targets, one after another. Narrower rows are filled up with unused entries, and rows
        without draws with 0 draws. KDError if vocab_size, temperatures or draw_temperature differ, or where some
        have an index and others none."""
        if not parts:
            raise KDError("cat: got no targets; expected at least one.")
        if len(parts) == 1:
            return parts[0]
        first = parts[0]
        for name in ("vocab_size", "temperatures", "draw_temperature"):
            if len(values := {getattr(part, name) for part in parts}) > 1:
                raise KDError(f"cat: got targets of different {name}: {', '.join(map(str, values))}; expected one.")
        if len({part.index is None for part in parts}) > 1:
            raise KDError("cat: got targets with and without an index; expected an index in all or in none.")
        width = max(part.width for part in parts)
        columns: dict[str, Any] = {
            field.name: torch.cat([part._column(field, width) for part in parts])
            for field in (*FIELDS, INDEX)
            if any(getattr(part, field.name) is not None for part in parts)
        }
        return replace(first, **columns)

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, NDArray[Any]],
        *,
        vocab_size: int,
        temperatures: Sequence[float],
        draw_temperature: float = 1.0,
        device: torch.device | str | None = None,
        index: NDArray[np.int64] | None = None,
    ) -> "SparseTargets":
        """Targets of the arrays in a cache's shard (`Cache.read_shard`, `Cache.sequences`): ids, logprobs, tail,
        outcomes and maybe draws; other names are ignored. vocab_size, temperatures, draw_temperature: of the cache's
        spec.

        On the CPU (the default) the targets share the arrays' memory. To a GPU they are copied from page-locked memory
        without waiting. KDError if an array is missing.
        """
        device = torch.device("cpu" if device is None else device)
        columns: dict[str, Any] = {}
        for field in FIELDS:
            if field.name in arrays:
                columns[field.name] = on_device(arrays[field.name], device)
            elif not field.optional:
                raise KDError(f"arrays: got no {field.name!r} among {', '.join(arrays)}; expected a shard's arrays.")
        return cls(
            **columns,
            vocab_size=vocab_size,
            temperatures=tuple(temperatures),
            draw_temperature=draw_temperature,
            index=None if index is None else on_device(index, device),
        )

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The targets as arrays in the types of `FIELDS`: what `CacheWriter.write_shard` takes, without `index`. On the
        CPU they share the tensors' memory where the types agree."""
        return {
            field.name: self._column(field, self.width).detach().to("cpu", field.dtype).numpy()
            for field in FIELDS
            if getattr(self, field.name) is not None
        }

    def _column(self, field: Field, width: int) -> Tensor:
        """A field with a row each, and of entries, rows of this width; filled up where they are narrower or missing."""
        value: Tensor | None = getattr(self, field.name)
        if value is None:
            return torch.full((len(self), width), field.fill, dtype=field.dtype, device=self.device)
        if value.ndim == 0:
            return value.to(field.dtype).expand(len(self))
        if field.shape == "NK" and value.shape[1] < width:
            return torch.nn.functional.pad(value, (0, width - value.shape[1]), value=field.fill)
        return value

    @classmethod
    def from_logits(cls, logits: Tensor, k: int | None = None, **options: Any) -> "SparseTargets":
        """Sparse targets of a teacher's logits `[N, V]` (or `[..., V]`): `topk_targets` with the same arguments."""
        from . import topk_targets

        return topk_targets(logits, k, **options)

    def at(
        self, temperature: float | Tensor, treatment: str = "auto", *, dtype: torch.dtype = torch.float32
    ) -> TargetsAt:
        """The teacher's distribution at a temperature under a treatment, in `dtype`.

        A tensor temperature is read on the host. KDError for an unknown treatment, or a temperature that these targets
        do not serve.
        """
        t = float(temperature)
        check_temperature(t, self.temperatures)
        draws, logprobs = self.draws, self.logprobs.to(dtype)
        treatment = resolve_treatment(treatment, t, has_draws=draws is not None, draw_temperature=self.draw_temperature)
        used = logprobs > -_INF
        drawn = used & (draws > 0) if draws is not None else torch.zeros_like(used)
        exact = used & ~drawn

        log_tail = _tail_at(t, self.tail.to(dtype), self.outcomes, self.temperatures)
        scaled = logprobs / t
        log_exact = _logsumexp(scaled.masked_fill(~exact, -_INF))
        log_z = torch.logaddexp(log_exact, log_tail)
        log_z = torch.where(log_z > -_INF, log_z, 0.0)  # a row with nothing in it at all stays −inf, not NaN
        log_q = scaled - log_z[:, None]
        log_q_tail = log_tail - log_z

        draws_only = drawn.any(1) & ~exact.any(1)
        if treatment == "renormalize":
            log_q = (scaled - log_exact[:, None]).masked_fill(~exact, -_INF)
            log_q_tail = torch.full_like(log_q_tail, -_INF).masked_fill(draws_only, torch.nan)
            return TargetsAt(log_q, log_q.exp(), log_q_tail)
        in_exact = log_q.masked_fill(~exact, -_INF)
        if treatment == "bucket":
            log_q_tail = torch.where(exact.any(1), log_q_tail, -_INF).masked_fill(draws_only, torch.nan)
            return TargetsAt(in_exact, in_exact.exp(), log_q_tail)

        # sampled: q_tail is shared among the drawn entries in proportion to c_j p_j^(1/T - 1/T_d)
        counts = draws.clamp(min=1).to(dtype) if draws is not None else torch.ones_like(logprobs)
        share = counts.log() + logprobs * (1.0 / t - 1.0 / self.draw_temperature)
        share = share.masked_fill(~drawn, -_INF)
        log_share = share - _logsumexp(share)[:, None]
        has_draws = drawn.any(1)
        log_w = torch.where(drawn, log_share + log_q_tail[:, None], in_exact)
        in_support = exact | drawn
        log_q = log_q.masked_fill(~in_support, -_INF)
        # a row without draws falls back to the bucket
        log_q_tail = torch.where(has_draws | ~exact.any(1), -_INF, log_q_tail)
        return TargetsAt(log_q, log_w.masked_fill(~in_support, -_INF).exp(), log_q_tail)


def _tail_at(t: float, tail_NM: Tensor, outcomes: Tensor, temperatures: tuple[float, ...]) -> Tensor:
    """The tail's log-partition `[N]` at temperature t; −inf for an empty tail."""
    weights = tail_weights(t, temperatures)
    empty = (outcomes <= 0) | (tail_NM == -_INF).any(1)
    result = torch.zeros_like(tail_NM[:, 0])
    if weights[0]:
        result = result + float(weights[0]) * outcomes.clamp(min=1).to(tail_NM.dtype).log()
    for m, weight in enumerate(weights[1:].tolist()):
        if weight:
            result = result + weight * tail_NM[:, m]
    return torch.where(empty, -_INF, result)


def _logsumexp(x_NK: Tensor) -> Tensor:
    """logsumexp over the last dimension, −inf for an empty one (where torch raises)."""
    return torch.logsumexp(x_NK, 1) if x_NK.shape[1] else x_NK.new_full((x_NK.shape[0],), -_INF)
