"""The stored entries of some rows, recomputed from a teacher's output: all logits, a few rows at a time."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...cache import CacheSpec
from ...errors import TeacherError
from ...kernels import KDError, topk_targets
from ...kernels.lm_head import LMHead
from ...kernels.topk.api import default_chunk
from ...kernels.topk.draws import exact_transform
from ...models.protocol import Hidden, Output
from ..answers import ROWS_AT_ONCE, flat_rows, topk_config

Array = NDArray[Any]
_BLOCK_BYTES = {"cpu": 16 << 20}  # of float32 logits at a time
_BLOCK_BYTES_GPU = 256 << 20


@dataclass(frozen=True, eq=False)
class Stored:
    """m rows as `Cache.read_shard` returns them. numbers: the rows' numbers in the dataset, which with the seed decide
    their draws; None: unknown, and draws are not repeated."""

    ids: Array  # [m, K]
    logprobs: Array  # [m, K]
    tail: Array  # [m, M]
    outcomes: Array  # [m]
    draws: Array | None = None  # [m, K]
    numbers: Array | None = None  # [m]
    seed: int = 0

    @property
    def used(self) -> NDArray[np.bool_]:
        """Which entries are used, `[m, K]`."""
        used: NDArray[np.bool_] = self.logprobs > -np.inf
        return used

    @property
    def top_k(self) -> NDArray[np.bool_]:
        """Which entries are top-k entries, `[m, K]`."""
        return self.used if self.draws is None else self.used & (self.draws == 0)

    def slice(self, rows: slice) -> "Stored":
        """Some of the rows."""
        arrays: dict[str, Any] = {n: value[rows] for n, value in vars(self).items() if isinstance(value, np.ndarray)}
        return replace(self, **arrays)


@dataclass(frozen=True, eq=False)
class Recomputed:
    """What the teacher answers now for the same m rows.

    logprobs: of the stored ids (any value in unused entries). tail, outcomes: outside the stored top-k entries. last:
    the log-probability of the teacher's own n-th best token, for n stored top-k entries; +inf for n = 0. same_draws:
    whether the draws are the stored ones; None if unknown.
    """

    logprobs: NDArray[np.float32]  # [m, K]
    tail: NDArray[np.float32]  # [m, M]
    outcomes: NDArray[np.int64]  # [m]
    last: NDArray[np.float32]  # [m]
    same_draws: NDArray[np.bool_] | None  # [m]


def recompute(output: Output, flat: Array, shape: torch.Size, stored: Stored, spec: CacheSpec) -> Recomputed:
    """Recompute stored rows from a teacher's output.

    flat: int64 `[m]`, the rows' indices in the flattened shape, `[B, L]` or `[B]`. Only a block of rows is in float32
    at a time. Raises TeacherError if the output has another shape, and KDError (with `row`, of the m) for a row with
    NaN, +inf or no finite logit.
    """
    rows_MX = flat_rows(output, shape, spec.vocab_size)
    flat_M = torch.from_numpy(flat).to(rows_MX.device)
    block = max(1, _BLOCK_BYTES.get(rows_MX.device.type, _BLOCK_BYTES_GPU) // (4 * spec.vocab_size))
    parts = []
    for start, logits_CV, lm_head in _chunks(output, rows_MX, flat_M):
        if logits_CV.shape[1] != spec.vocab_size:
            raise TeacherError(f"teacher: got {logits_CV.shape[1]} logits; expected vocab_size, {spec.vocab_size}.")
        for first in range(0, len(logits_CV), block):
            logits_BV = logits_CV[first : first + block]
            rows = slice(start + first, start + first + len(logits_BV))
            try:
                parts.append(_recompute_block(logits_BV, lm_head, stored.slice(rows), spec))
            except KDError as error:
                if error.row is None:
                    raise
                raise KDError(str(error), row=rows.start + error.row) from error
    names = [field.name for field in fields(Recomputed) if getattr(parts[0], field.name) is not None]
    arrays: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return Recomputed(**{"same_draws": None, **arrays})


def _chunks(output: Output, rows_MX: Tensor, flat_M: Tensor) -> Iterator[tuple[int, Tensor, LMHead | None]]:
    """Logits of the rows in chunks of capture's size, since another product may round differently. With the LM head
    that has yet to scale and cap them."""
    lm_head = output.lm_head if isinstance(output, Hidden) else None
    matrix = lm_head if isinstance(lm_head, LMHead) else None
    step = ROWS_AT_ONCE if matrix is None else default_chunk(rows_MX, matrix.weight.shape[0])
    for start in range(0, len(flat_M), step):
        chunk = rows_MX[flat_M[start : start + step]]
        if matrix is not None:
            with torch.autocast(chunk.device.type, enabled=False):
                weight = matrix.weight.t()
                chunk = torch.mm(chunk, weight) if matrix.bias is None else torch.addmm(matrix.bias, chunk, weight)
        elif lm_head is not None and not isinstance(lm_head, LMHead):
            chunk = lm_head(chunk)
        yield start, chunk, matrix


def _recompute_block(logits_BV: Tensor, lm_head: LMHead | None, stored: Stored, spec: CacheSpec) -> Recomputed:
    device, n = logits_BV.device, len(logits_BV)
    scale, cap = (None, None) if lm_head is None else (lm_head.logit_scale, lm_head.softcap)
    padded = torch.empty((n, spec.vocab_size + 1), dtype=torch.float32, device=device)  # one column for unused entries
    z_BV = padded[:, :-1]
    z_BV.copy_(logits_BV)
    if scale is not None or cap is not None:
        z_BV.copy_(exact_transform(z_BV, scale, cap))
    top_B1 = z_BV.amax(1, keepdim=True)
    if not bool((fine := top_B1[:, 0].isfinite()).all()):
        raise KDError("its logits have NaN, +inf, or no finite number", row=int((~fine).nonzero()[0, 0]))
    z_BV.sub_(top_B1)
    log_z_B1 = z_BV.exp().sum(1, keepdim=True).log_()
    ids_BK = torch.from_numpy(np.ascontiguousarray(stored.ids, np.int64)).to(device)
    logprobs = padded.gather(1, ids_BK) - log_z_B1
    finite = (z_BV > -torch.inf).sum(1)
    top_k_BK = torch.from_numpy(stored.top_k).to(device)
    in_top_k = (top_k_BK & (logprobs > -torch.inf)).sum(1)
    padded.scatter_(1, torch.where(top_k_BK, ids_BK, spec.vocab_size), -torch.inf)
    tail = _tails(z_BV, log_z_B1, spec.temperatures)
    del padded, z_BV
    last, same = _repeat_top_k(logits_BV, scale, cap, stored, spec)
    return Recomputed(logprobs.cpu().numpy(), tail.cpu().numpy(), (finite - in_top_k).cpu().numpy(), last, same)


def _tails(z_BV: Tensor, log_z_B1: Tensor, temperatures: tuple[float, ...]) -> Tensor:
    """`log Σ p^(1/T)` `[B, M]` over the finite z, minus the log-partition. Overwrites z."""
    top_B1 = z_BV.amax(1, keepdim=True)
    nonempty = top_B1 > -torch.inf
    z_BV.sub_(torch.where(nonempty, top_B1, 0.0))
    tails = [(z_BV / t).exp_().sum(1, keepdim=True).log_() + (top_B1 - log_z_B1) / t for t in temperatures]
    return torch.where(nonempty, torch.cat(tails, 1), -torch.inf)


def _repeat_top_k(
    logits_BV: Tensor, scale: float | None, cap: float | None, stored: Stored, spec: CacheSpec
) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
    """`Recomputed.last` and `Recomputed.same_draws`, `[B]` each, by the top-k that capture ran."""
    transform: dict[str, Any] = {"softcap": cap, "logit_scale": scale}
    targets, same = None, None
    if stored.draws is not None and stored.numbers is not None:
        targets = topk_targets(
            logits_BV,
            config=topk_config(spec, seed=stored.seed),
            positions=torch.from_numpy(np.ascontiguousarray(stored.numbers, np.int64)).to(logits_BV.device),
            **transform,
        )
        assert targets.draws is not None
        now = _sorted_draws(targets.ids.cpu().numpy(), targets.draws.cpu().numpy())
        same = (now == _sorted_draws(stored.ids, stored.draws)).all(1)
    counts = stored.top_k.sum(1)
    if not spec.k:
        return np.full(len(counts), np.inf, np.float32), same
    if targets is None or spec.mass is not None:  # cut at the mass, the top-k entries do not include the next best
        config = topk_config(spec, mass=None, draws=0, temperatures=(1.0,))
        targets = topk_targets(logits_BV, config=config, **transform)
    last = np.take_along_axis(targets.logprobs.cpu().numpy(), np.maximum(counts - 1, 0)[:, None], 1)[:, 0]
    return np.where(counts > 0, last, np.float32(np.inf)), same


def _sorted_draws(ids_NK: Array, draws_NK: Array) -> Array:
    """Id and count of each draw as one number, sorted, `[N, K]`."""
    both = np.where(draws_NK > 0, (ids_NK.astype(np.int64) << 32) | draws_NK, 0)
    return np.sort(both, axis=1)
