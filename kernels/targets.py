"""SparseTargets: what a teacher said, in a few numbers a position, and what follows from them at any temperature."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import KDError
from .tail import check_temperature, tail_weights
from .treatment import resolve_treatment

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
INTEGER_TYPE = "an integer type (int8 to int64, or uint8: torch does not compute with wider unsigned ones)"
_INF = float("inf")


class TargetsAt(NamedTuple):
    """The teacher at one temperature under one treatment: what a loss sees.

    log_q `[N, K]`: true log-probability of each entry of the support S; −inf marks a place outside S.
    weights `[N, K]`: the weight of each entry's term; equal to q except under `sampled`. 0 outside S.
    log_q_tail `[N]`: log-probability of everything outside S as one outcome; −inf where there is none. NaN in a row
        that the treatment cannot take (draws alone, under `bucket` or `renormalize`).
    """

    log_q: Tensor
    weights: Tensor
    log_q_tail: Tensor


@dataclass(frozen=True, eq=False)
class SparseTargets:
    """Sparse soft targets of N positions: K entries each, and the log-partition of all that is not among them.

    ids `[N, K]` int: first the head (exact, best first), then the drawn tail entries (best first). Unused places come
        last: id 0, logprob −inf, draws 0.
    logprobs `[N, K]` float: natural log of the teacher's probability at T = 1 under its full softmax.
    tail `[N, M]` float: `log Σ_{j outside the head} p_j^(1/T_m)` for each temperature of the grid.
    outcomes `[N]` or `[]` int: finite teacher logits outside the head.
    draws `[N, K]` int or None: 0 for a member of the head; c >= 1: drawn c times, with replacement, from the tail's
        softmax at `draw_temperature`.
    temperatures: the grid, M distinct numbers with 1.0 among them.
    vocab_size: the width of the teacher's head.
    index `[N]` int64 or None: for compact targets, the (flattened) position each row belongs to; positions without a
        row do not count in a loss. Without it, row i is position i.

    Raises KDError where shapes or types do not fit together. What the tensors hold is checked where they are used.
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

    def __post_init__(self) -> None:
        for name in ("ids", "logprobs", "tail", "draws", "index"):
            value = getattr(self, name)
            if not isinstance(value, Tensor) and (name not in ("draws", "index") or value is not None):
                raise KDError(f"targets.{name}: got {type(value).__name__}; expected a tensor.")
        if not isinstance(self.outcomes, Tensor):
            if not isinstance(self.outcomes, Integral):
                raise KDError(f"targets.outcomes: got {self.outcomes!r}; expected a tensor or an int.")
            object.__setattr__(self, "outcomes", torch.as_tensor(int(self.outcomes), device=self.ids.device))
        if self.ids.ndim != 2:
            raise KDError(f"targets.ids: got shape {tuple(self.ids.shape)}; expected (positions, entries).")
        if not isinstance(self.temperatures, Iterable) or not all(isinstance(t, Real) for t in self.temperatures):
            raise KDError(f"temperatures: got {self.temperatures!r}; expected numbers.")
        object.__setattr__(self, "temperatures", tuple(float(t) for t in self.temperatures))
        n = self.ids.shape[0]
        expected: dict[str, list[tuple[int, ...]]] = {
            "logprobs": [tuple(self.ids.shape)],
            "draws": [tuple(self.ids.shape)],
            "tail": [(n, len(self.temperatures))],
            "outcomes": [(n,), ()],
            "index": [(n,)],
        }
        for name, shapes in expected.items():
            value = getattr(self, name)
            if value is None:
                continue
            if tuple(value.shape) not in shapes:
                wanted = " or ".join(map(str, shapes))
                raise KDError(f"targets.{name}: got shape {tuple(value.shape)}; expected {wanted} beside ids.")
            if value.device != self.ids.device:
                raise KDError(
                    f"targets.{name}: got a tensor on {value.device}, ids on {self.ids.device}; use .to(device)."
                )
            if name in ("logprobs", "tail") and value.dtype not in FLOATS:
                raise KDError(f"targets.{name}: got {value.dtype}; expected a floating-point type.")
            if name not in ("logprobs", "tail") and value.dtype not in INTEGERS:
                raise KDError(f"targets.{name}: got {value.dtype}; expected {INTEGER_TYPE}.")
        if self.ids.dtype not in INTEGERS:
            raise KDError(f"targets.ids: got {self.ids.dtype}; expected {INTEGER_TYPE}.")
        grid = self.temperatures
        # compared one by one: torch.compile may hold them as symbols, of which it knows neither `in` nor sets
        distinct = all(s != t for i, t in enumerate(grid) for s in grid[:i])
        if not any(t == 1.0 for t in grid) or not distinct or not all(0 < t < _INF for t in grid):
            raise KDError(f"temperatures: got {grid}; expected distinct positive numbers with 1.0 among them.")
        if not isinstance(self.draw_temperature, Real) or not 0 < self.draw_temperature < _INF:
            raise KDError(f"draw_temperature: got {self.draw_temperature!r}; expected a positive number.")
        if not isinstance(self.vocab_size, Integral) or self.vocab_size < 1:
            raise KDError(f"vocab_size: got {self.vocab_size!r}; expected the width of the teacher's head.")
        # numpy's numbers become Python's: an operator takes no others
        object.__setattr__(self, "draw_temperature", float(self.draw_temperature))
        object.__setattr__(self, "vocab_size", int(self.vocab_size))

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the targets are."""
        return self.ids.device

    def _map(self, function: Callable[[Tensor], Tensor]) -> "SparseTargets":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {k: function(v) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **changed)

    def __getitem__(self, rows: slice | Tensor) -> "SparseTargets":
        """The targets of some rows: a slice, a boolean mask or a tensor of row numbers."""
        if not isinstance(rows, (slice, Tensor)):
            raise KDError(f"targets[...]: got {type(rows).__name__}; expected a slice, a mask or a tensor of rows.")
        return self._map(lambda x: x if x.ndim == 0 else x[rows])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "SparseTargets":
        """The targets on another device."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "SparseTargets":
        """The targets in page-locked memory, from which a copy to a device can run ahead."""
        return self._map(lambda x: x.pin_memory())

    @classmethod
    def from_logits(
        cls,
        logits: Tensor,
        k: int,
        *,
        temperatures: Sequence[float] = (1.0, 1.5, 2.0, 4.0),
        mass: float | None = None,
        draws: int = 0,
        draw_temperature: float = 1.0,
        seed: int = 0,
        positions: Tensor | None = None,
    ) -> "SparseTargets":
        """Sparse targets of a teacher's logits `[N, V]` (or `[..., V]`): see `topk_targets`, which this calls."""
        from . import topk_targets

        return topk_targets(
            logits,
            k,
            temperatures=temperatures,
            mass=mass,
            draws=draws,
            draw_temperature=draw_temperature,
            seed=seed,
            positions=positions,
        )

    def at(
        self, temperature: float | Tensor, treatment: str = "auto", *, dtype: torch.dtype = torch.float32
    ) -> TargetsAt:
        """The teacher at a temperature under a treatment, in `dtype`. Raises KDError where either cannot be had."""
        return targets_at(
            self.logprobs,
            self.draws,
            self.tail,
            self.outcomes,
            temperature,
            treatment,
            temperatures=self.temperatures,
            draw_temperature=self.draw_temperature,
            dtype=dtype,
        )


def targets_at(
    logprobs: Tensor,
    draws: Tensor | None,
    tail: Tensor,
    outcomes: Tensor,
    temperature: float | Tensor,
    treatment: str,
    *,
    temperatures: tuple[float, ...],
    draw_temperature: float,
    dtype: torch.dtype = torch.float32,
) -> TargetsAt:
    """`SparseTargets.at` on bare tensors. A tensor temperature is read on the host here (the Triton kernels do not)."""
    t = float(temperature)
    check_temperature(t, temperatures)
    treatment = resolve_treatment(treatment, t, has_draws=draws is not None, draw_temperature=draw_temperature)
    logprobs = logprobs.to(dtype)
    used = logprobs > -_INF
    drawn = used & (draws > 0) if draws is not None else torch.zeros_like(used)
    head = used & ~drawn

    log_tail = _tail_at(t, tail.to(dtype), outcomes, temperatures)
    scaled = logprobs / t
    log_head = _logsumexp(scaled.masked_fill(~head, -_INF))
    log_z = torch.logaddexp(log_head, log_tail)
    log_z = torch.where(log_z > -_INF, log_z, 0.0)  # a row with nothing in it at all stays −inf, not NaN
    log_q = scaled - log_z[:, None]
    log_q_tail = log_tail - log_z

    draws_only = drawn.any(1) & ~head.any(1)
    if treatment == "renormalize":
        log_q = (scaled - log_head[:, None]).masked_fill(~head, -_INF)
        log_q_tail = torch.full_like(log_q_tail, -_INF).masked_fill(draws_only, torch.nan)
        return TargetsAt(log_q, log_q.exp(), log_q_tail)
    in_head = log_q.masked_fill(~head, -_INF)
    if treatment == "bucket":
        log_q_tail = torch.where(head.any(1), log_q_tail, -_INF).masked_fill(draws_only, torch.nan)
        return TargetsAt(in_head, in_head.exp(), log_q_tail)

    # sampled: q_tail is shared among the drawn entries in proportion to c_j p_j^(1/T - 1/T_d)
    counts = draws.clamp(min=1).to(dtype) if draws is not None else torch.ones_like(logprobs)
    share = counts.log() + logprobs * (1.0 / t - 1.0 / draw_temperature)
    share = share.masked_fill(~drawn, -_INF)
    log_share = share - _logsumexp(share)[:, None]
    has_draws = drawn.any(1)
    log_w = torch.where(drawn, log_share + log_q_tail[:, None], in_head)
    in_support = head | drawn
    log_q = log_q.masked_fill(~in_support, -_INF)
    # a row without draws falls back to the bucket
    log_q_tail = torch.where(has_draws | ~head.any(1), -_INF, log_q_tail)
    return TargetsAt(log_q, log_w.masked_fill(~in_support, -_INF).exp(), log_q_tail)


def _tail_at(t: float, tail_NM: Tensor, outcomes: Tensor, temperatures: tuple[float, ...]) -> Tensor:
    """The tail's log-partition `[N]` at temperature t; −inf where the tail is empty."""
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
