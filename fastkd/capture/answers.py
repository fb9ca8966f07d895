"""From a teacher's answer (hidden states, logits or top-k entries) to sparse targets."""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ..cache.errors import CacheError
from ..cache.manifest import read_spec
from ..cache.spec import CacheSpec
from ..cache.stores import Store, open_store
from ..errors import TeacherError
from ..kernels import KDError, LMHead, SparseTargets, TopKConfig, linear_topk_targets, topk_targets
from ..models.protocol import Hidden, TopK
from ..settings import CaptureSettings, MutualSettings, TargetSettings
from ..teachers.protocol import Answer

ROWS_AT_ONCE = 1024  # of logits that are gathered, or projected, at a time
_LOST_TO_ROUNDING = 2.0**-24  # the least missing probability that float32 log-probabilities tell
_DEFAULT_K = (TargetSettings.k, MutualSettings.k)  # not asked for: of fewer outcomes, all are kept
_EXCESS = 1e-3  # by which the probabilities of an answer may exceed 1, as rounding makes them


def topk_config(settings: CaptureSettings | CacheSpec, **changes: Any) -> TopKConfig:
    """The top-k config of a capture's settings or of a cache's spec, with some fields changed."""
    names = [field.name for field in fields(TopKConfig) if hasattr(settings, field.name)]
    return TopKConfig(**{name: getattr(settings, name) for name in names} | changes)


def check_limits(teacher: Any, settings: CaptureSettings, out: Any = None) -> None:
    """TeacherError if the settings ask for more than a teacher declares: `tail_temperatures`, `max_k`, `vocab_size`,
    `max_positions`.

    teacher: a `Teacher`, or the `Declared` limits of one that is not loaded yet. out: where the capture writes to: a
    cache that was begun with more top-k entries than there are outcomes is continued.
    """
    temperatures = getattr(teacher, "tail_temperatures", None)
    if temperatures is not None:  # first: a server is not asked for `max_k` in vain
        _check_tails(settings, temperatures)
    if (max_k := getattr(teacher, "max_k", None)) is not None:
        _check_topk(settings, max_k, temperatures or (1.0,), teacher.vocab_size, getattr(teacher, "max_k_is", ""))
    if settings.k not in _DEFAULT_K and settings.k > (teacher.vocab_size or settings.k) and settings.k != _k_of(out):
        raise TeacherError(
            f"k: got {settings.k}; expected at most {teacher.vocab_size}, the outcomes of this teacher (its "
            "vocabulary or classes): that stores the whole distribution."
        )
    longest: int | None = getattr(teacher, "max_positions", None)
    if longest is not None and settings.context is not None and settings.context > longest:
        raise TeacherError(f"context: got {settings.context}; expected at most {longest}, the limit of this teacher.")


def _k_of(out: Any) -> int | None:
    """The top-k entries of the cache in a store, or under a name; None if there is none."""
    if out is None:
        return None
    try:
        return read_spec(out if isinstance(out, Store) else open_store(out)).k
    except CacheError:  # whatever it is, it is refused later
        return None


def large_k_text(k: int, draws: int, vocab_size: int) -> list[str]:
    """A line if k exceeds the teacher's number of outcomes; none otherwise."""
    if k <= vocab_size:
        return []
    no_draws = f", and the {draws:,} draws are unused" if draws else ""
    return [f"k = {k:,} exceeds the teacher's {vocab_size:,} outcomes: every target holds all of them{no_draws}"]


def targets_of(
    answer: Answer, flat_M: Tensor, numbers_M: Tensor, settings: CaptureSettings, shape: torch.Size, vocab_size: int
) -> SparseTargets:
    """The targets of some rows of a teacher's answer.

    flat_M: int64 `[m]`, indices of the rows in the flattened `[B, L]` (or `[B]`). numbers_M: int64 `[m]`, the rows'
    numbers in the dataset, which seed their draws. shape: `[B, L]` or `[B]`. Raises TeacherError if the answer has
    another shape or lacks what the settings need, and KDError (with `row`, of the m) for a row that is no distribution;
    for logits and hidden states on the CPU only.
    """
    if isinstance(answer, TopK):
        return _targets_of_topk(answer, flat_M, settings, shape, vocab_size)
    config = topk_config(settings)
    values, lm_head = (answer.states, answer.lm_head) if isinstance(answer, Hidden) else (answer.values, None)
    _check_shape(values, shape, "V")
    if lm_head is None or isinstance(lm_head, LMHead):
        width = values.shape[-1] if lm_head is None else len(lm_head.weight)
        if width != vocab_size:
            raise TeacherError(f"teacher: got logits of width {width}; expected vocab_size, {vocab_size}.")
    rows_MX = values.reshape(-1, values.shape[-1])
    if isinstance(lm_head, LMHead):
        return linear_topk_targets(rows_MX[flat_M], lm_head, config=config, positions=numbers_M)
    parts = []
    for start in range(0, len(flat_M), ROWS_AT_ONCE):
        chunk = slice(start, start + ROWS_AT_ONCE)
        logits_CV = rows_MX[flat_M[chunk]]
        if lm_head is not None:
            logits_CV = lm_head(logits_CV)
        try:
            parts.append(topk_targets(logits_CV, config=config, positions=numbers_M[chunk]))
        except KDError as error:
            if error.row is None:
                raise
            raise KDError(str(error), row=start + error.row) from error
    return SparseTargets.cat(parts)


def _targets_of_topk(
    answer: TopK, flat_M: Tensor, settings: CaptureSettings, shape: torch.Size, vocab_size: int
) -> SparseTargets:
    """Top-k entries, best first; entries that are not kept, by k or by mass, are added to the tail."""
    _check_shape(answer.ids, shape, "K")
    _check_shape(answer.logprobs, shape, "K")
    width = answer.ids.shape[-1]
    _check_topk(settings, width, answer.temperatures, vocab_size)
    logprobs_MK, order = answer.logprobs.reshape(-1, width)[flat_M].double().sort(dim=1, descending=True, stable=True)
    ids_MK = answer.ids.reshape(-1, width)[flat_M].gather(1, order)
    used = logprobs_MK > -torch.inf
    p_MK = logprobs_MK.exp()
    missing_M = 1 - p_MK.sum(1)
    _check_rows(ids_MK, logprobs_MK, used, missing_M, vocab_size)
    kept = used & (torch.arange(width, device=used.device) < settings.k)
    if settings.mass is not None:
        kept &= p_MK.cumsum(1) - p_MK < settings.mass
    if answer.tail is None:
        missing_M = torch.where(used.sum(1) < vocab_size, missing_M.clamp(min=_LOST_TO_ROUNDING), 0.0)
        tail_MM = missing_M.log()[:, None]
    else:
        _check_shape(answer.tail, shape, "M")
        columns = [answer.temperatures.index(t) for t in settings.temperatures]
        tail_MM = answer.tail.reshape(-1, answer.tail.shape[-1])[flat_M].double()[:, columns]
    dropped_MK = logprobs_MK.masked_fill(kept, -torch.inf)
    dropped = torch.stack([torch.logsumexp(dropped_MK / t, 1) for t in settings.temperatures], 1)
    k = min(settings.k, vocab_size)
    return SparseTargets(
        ids=ids_MK.masked_fill(~kept, 0)[:, :k].int(),
        logprobs=logprobs_MK.masked_fill(~kept, -torch.inf)[:, :k].float(),
        tail=torch.logaddexp(tail_MM, dropped).float(),
        outcomes=(vocab_size - kept.sum(1)).int(),
        vocab_size=vocab_size,
        temperatures=settings.temperatures,
    )


def _check_tails(settings: CaptureSettings, temperatures: tuple[float, ...]) -> None:
    """TeacherError if top-k entries with tails at these temperatures are not enough for the settings, whatever k is."""
    lacking = [t for t in settings.temperatures if t not in temperatures]
    use = f"Use --draws 0 --temperatures {' '.join(f'{t:g}' for t in temperatures)}."
    if settings.draws:
        raise TeacherError(
            f"draws: got {settings.draws}; expected 0: this teacher answers with top-k entries, so there is nothing to "
            f"draw from. {use if lacking else 'Use --draws 0.'}"
        )
    if lacking:
        raise TeacherError(
            f"temperatures: got {', '.join(map(str, lacking))}; expected none but {', '.join(map(str, temperatures))}, "
            f"the temperatures of the tails that this teacher answers with. {use}"
        )


def _check_topk(
    settings: CaptureSettings, max_k: int, temperatures: tuple[float, ...], vocab_size: int, max_k_is: str = ""
) -> None:
    """TeacherError if top-k entries with tails at these temperatures are not enough for the settings. max_k_is: what
    limits the entries, and what to do about it."""
    _check_tails(settings, temperatures)
    if min(settings.k, vocab_size) > max_k:
        limit = max_k_is or "the entries of this teacher's answers."
        raise TeacherError(f"k: got {settings.k}; expected at most {max_k}, {limit}")


def _check_rows(ids_MK: Tensor, logprobs_MK: Tensor, used: Tensor, missing_M: Tensor, vocab_size: int) -> None:
    """KDError for the first row whose entries are no part of a distribution."""
    entry = torch.arange(ids_MK.shape[1], device=ids_MK.device)
    by_id = torch.where(used, ids_MK.long(), -1 - entry).sort(1).values
    for bad_M, problem in (
        (logprobs_MK.isnan().any(1), "got NaN; expected log-probabilities"),
        ((used & ((ids_MK < 0) | (ids_MK >= vocab_size))).any(1), f"expected ids from 0 to {vocab_size - 1}"),
        (~used.any(1), "got no entry; expected at least one"),
        ((by_id[:, 1:] == by_id[:, :-1]).any(1), "got an id twice; expected each at most once"),
        (missing_M < -_EXCESS, "got probabilities that sum to more than 1"),
    ):
        if bool(bad_M.any()):
            raise KDError(f"its top-k entries: {problem}", row=int(bad_M.nonzero()[0, 0]))


def _check_shape(values: Tensor, shape: torch.Size, last: str) -> None:
    if tuple(values.shape[:-1]) != tuple(shape):
        raise TeacherError(
            f"teacher: got an answer of shape {tuple(values.shape)}; expected ({', '.join(map(str, shape))}, {last}), "
            f"a row for each {'position' if len(shape) == 2 else 'example'}."
        )
