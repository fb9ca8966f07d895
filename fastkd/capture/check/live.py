"""What a teacher says now of entries that were stored: the full distribution is looked at, a few rows at a time."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
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
from ..answers import ROWS_AT_ONCE, flat_rows

Array = NDArray[Any]
_BLOCK_BYTES = {"cpu": 16 << 20}  # of float32 logits at a time
_BLOCK_BYTES_ELSEWHERE = 256 << 20


@dataclass(frozen=True, eq=False)
class Stored:
    """m rows as a cache has them: `Cache.read_shard`. numbers `[m]`: of each row in the data set, where it is known;
    then the draws of `seed` are made again."""

    ids: Array  # [m, K]
    logprobs: Array  # [m, K]
    tail: Array  # [m, M]
    outcomes: Array  # [m]
    draws: Array | None = None  # [m, K]
    numbers: Array | None = None
    seed: int = 0

    @property
    def used(self) -> NDArray[np.bool_]:
        """Which places hold an entry, `[m, K]`."""
        used: NDArray[np.bool_] = self.logprobs > -np.inf
        return used

    @property
    def head(self) -> NDArray[np.bool_]:
        """Which places hold an entry of the head, `[m, K]`."""
        return self.used if self.draws is None else self.used & (self.draws == 0)


@dataclass(frozen=True, eq=False)
class Live:
    """What the teacher says now of the same m rows.

    logprobs `[m, K]`: of the stored ids (anything in unused places). tail `[m, M]`, outcomes `[m]`: outside of the
    stored head. last `[m]`: the log-probability of the teacher's own n-th best token, n being the entries of the stored
    head; +inf where it is empty. same_draws `[m]`: whether the same is drawn again; None where that is not known.
    """

    logprobs: NDArray[np.float32]
    tail: NDArray[np.float32]
    outcomes: NDArray[np.int64]
    last: NDArray[np.float32]
    same_draws: NDArray[np.bool_] | None


def live_rows(output: Output, flat: Array, shape: torch.Size, stored: Stored, spec: CacheSpec) -> Live:
    """Look the stored entries up in a teacher's output.

    flat: int64 `[m]`, where the rows are among all of `[B, L]` (or `[B]`), which is shape. No more than a few
    rows' logits are ever there in float32. Raises TeacherError where the output is of another shape, and KDError (with
    `row`, of the m) where a row has NaN, +inf or no finite number.
    """
    rows_MX = flat_rows(output, shape, spec.vocab_size)
    flat_M = torch.from_numpy(flat).to(rows_MX.device)
    block = _BLOCK_BYTES.get(rows_MX.device.type, _BLOCK_BYTES_ELSEWHERE) // (4 * spec.vocab_size)
    parts = []
    for start, logits_CV, head in _chunks(output, rows_MX, flat_M):
        if logits_CV.shape[1] != spec.vocab_size:
            raise TeacherError(
                f"teacher: found logits of {logits_CV.shape[1]} tokens; vocab_size is {spec.vocab_size}."
            )
        for first in range(0, len(logits_CV), max(1, block)):
            logits_BV = logits_CV[first : first + max(1, block)]
            some = slice(start + first, start + first + len(logits_BV))
            try:
                parts.append(_block(logits_BV, head, _sliced(stored, some), spec))
            except KDError as error:
                if error.row is None:
                    raise
                raise KDError(str(error), row=some.start + error.row) from error
    same = [part.same_draws for part in parts if part.same_draws is not None]
    return Live(
        logprobs=np.concatenate([part.logprobs for part in parts]),
        tail=np.concatenate([part.tail for part in parts]),
        outcomes=np.concatenate([part.outcomes for part in parts]),
        last=np.concatenate([part.last for part in parts]),
        same_draws=np.concatenate(same) if same else None,
    )


def _chunks(output: Output, rows_MX: Tensor, flat_M: Tensor) -> Iterator[tuple[int, Tensor, LMHead | None]]:
    """Logits of the rows, so many at a time as capture makes: another product may round otherwise. With the head that
    they have yet to be scaled and capped by."""
    head = output.lm_head if isinstance(output, Hidden) and isinstance(output.lm_head, LMHead) else None
    step = ROWS_AT_ONCE if head is None else default_chunk(rows_MX, head.weight.shape[0])
    for start in range(0, len(flat_M), step):
        chunk = rows_MX[flat_M[start : start + step]]
        if head is not None:
            with torch.autocast(chunk.device.type, enabled=False):
                weight = head.weight.t()
                chunk = torch.mm(chunk, weight) if head.bias is None else torch.addmm(head.bias, chunk, weight)
        elif isinstance(output, Hidden):
            assert not isinstance(output.lm_head, LMHead)
            chunk = output.lm_head(chunk)
        yield start, chunk, head


def _block(logits_BV: Tensor, head: LMHead | None, stored: Stored, spec: CacheSpec) -> Live:
    device, n = logits_BV.device, len(logits_BV)
    scale, cap = (None, None) if head is None else (head.logit_scale, head.softcap)
    room = torch.empty((n, spec.vocab_size + 1), dtype=torch.float32, device=device)  # the last takes what is no entry
    z_BV = room[:, :-1]
    z_BV.copy_(logits_BV)
    if scale is not None or cap is not None:
        z_BV.copy_(exact_transform(z_BV, scale, cap))
    top_B1 = z_BV.amax(1, keepdim=True)
    if not bool((fine := top_B1[:, 0].isfinite()).all()):
        raise KDError("its logits have NaN, +inf, or no finite number", row=int((~fine).nonzero()[0, 0]))
    z_BV.sub_(top_B1)
    log_z_B1 = z_BV.exp().sum(1, keepdim=True).log_()
    ids_BK = torch.from_numpy(np.ascontiguousarray(stored.ids, np.int64)).to(device)
    logprobs = room.gather(1, ids_BK) - log_z_B1
    finite = (z_BV > -torch.inf).sum(1)
    head_BK = torch.from_numpy(stored.head).to(device)
    in_head = (head_BK & (logprobs > -torch.inf)).sum(1)
    room.scatter_(1, torch.where(head_BK, ids_BK, spec.vocab_size), -torch.inf)
    tail = _tails(z_BV, log_z_B1, spec.temperatures)
    del room, z_BV
    last, same = _again(logits_BV, scale, cap, stored, spec)
    return Live(logprobs.cpu().numpy(), tail.cpu().numpy(), (finite - in_head).cpu().numpy(), last, same)


def _tails(z_BV: Tensor, log_z_B1: Tensor, temperatures: tuple[float, ...]) -> Tensor:
    """`log Σ p^(1/T)` `[B, M]` over the finite z, less the log-partition. Overwrites z."""
    top_B1 = z_BV.amax(1, keepdim=True)
    there = top_B1 > -torch.inf
    z_BV.sub_(torch.where(there, top_B1, 0.0))
    found = [(z_BV / t).exp_().sum(1, keepdim=True).log_() + (top_B1 - log_z_B1) / t for t in temperatures]
    return torch.where(there, torch.cat(found, 1), -torch.inf)


def _again(
    logits_BV: Tensor, scale: float | None, cap: float | None, stored: Stored, spec: CacheSpec
) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
    """The teacher's own last entry of heads as long as the stored ones, and whether the same is drawn again."""
    transform: dict[str, Any] = {"softcap": cap, "logit_scale": scale}
    targets, same = None, None
    if stored.draws is not None and stored.numbers is not None:
        targets = topk_targets(
            logits_BV,
            spec.k,
            temperatures=spec.temperatures,
            mass=spec.mass,
            draws=spec.draws,
            draw_temperature=spec.draw_temperature,
            seed=stored.seed,
            positions=torch.from_numpy(np.ascontiguousarray(stored.numbers, np.int64)).to(logits_BV.device),
            **transform,
        )
        assert targets.draws is not None
        same = (_drawn(targets.ids.cpu().numpy(), targets.draws.cpu().numpy()) == _drawn(stored.ids, stored.draws)).all(
            1
        )
    counts = stored.head.sum(1)
    if not spec.k:
        return np.full(len(counts), np.inf, np.float32), same
    if targets is None or spec.mass is not None:  # a cut head does not say what comes behind it
        targets = topk_targets(logits_BV, spec.k, temperatures=(1.0,), **transform)
    best = np.take_along_axis(targets.logprobs.cpu().numpy(), np.maximum(counts - 1, 0)[:, None], 1)[:, 0]
    return np.where(counts > 0, best, np.float32(np.inf)), same


def _drawn(ids_NK: Array, draws_NK: Array) -> Array:
    """What was drawn in each row and how often, as numbers in an order, `[N, K]`."""
    both = np.where(draws_NK > 0, (ids_NK.astype(np.int64) << 32) | draws_NK, 0)
    return np.sort(both, axis=1)


def _sliced(stored: Stored, some: slice) -> Stored:
    arrays: dict[str, Any] = {n: value[some] for n, value in vars(stored).items() if isinstance(value, np.ndarray)}
    return replace(stored, **arrays)
