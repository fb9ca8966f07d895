"""Checks of the values inside the tensors of a call, where reading them costs no wait."""

import os

import torch
from torch import Tensor

from ..errors import KDError
from ..tail import check_temperature
from ..targets import SparseTargets
from ..vocab_parallel import all_gather
from .call import Call
from .config import check_numbers

# A cache stores log-probabilities with an error of up to half a step (some 0.1 nats at the coarsest): the best entry of
# a certain teacher may be that far above 0.
LOGPROB_ROUNDING = 0.125

_INF = float("inf")
_debug = os.environ.get("FASTKD_DEBUG", "0") not in ("", "0")


def set_debug(enabled: bool) -> None:
    """Check the values inside tensors on every device, which synchronises with it.

    On: a call raises KDError, naming row and argument. Off (the default, unless the environment has FASTKD_DEBUG=1):
    Triton kernels on a GPU check nothing. They read and write nothing out of bounds, and a row with a bad id, label,
    log-probability or setting has the loss NaN; but an id twice in a row, a position twice in `targets.index` (both
    give a wrong loss and gradient), log-probabilities above 0, and outcomes or draws that are no counts pass. On a CPU,
    and by the implementations `torch` and `reference`, values are always checked.
    """
    global _debug
    _debug = enabled


def values_are_checked(device: torch.device) -> bool:
    """Whether calls of the Triton kernels on this device check the values inside tensors."""
    return _debug or device.type == "cpu"


def check_values(call: Call, positions: int, width: int) -> None:
    """Raise KDError naming the row and the argument of the first bad value in the tensors of a call.

    Of a divided vocabulary all ranks call it, and all raise if one does, or if their ids, labels or mask differ.
    """
    if call.group is None:
        return _check_values(call, positions, width)
    error = None
    try:
        _check_values(call, positions, width)
    except KDError as found:
        error = found
    same = {"targets": call.targets.ids, "targets.index": call.targets.index, "labels": call.labels, "mask": call.mask}
    own = [torch.tensor(error is not None), *(torch.tensor(0) if x is None else x.sum() for x in same.values())]
    device = call.targets.device
    by_rank = all_gather(torch.stack([x.to(device, torch.int64) for x in own]), call.group).tolist()
    if error is not None:
        raise error
    refuses = [rank for rank, (refused, *_) in enumerate(by_rank) if refused]
    if refuses:
        raise KDError(f"group: rank {refuses[0]} of the group refuses its arguments, and says why.")
    for rank, (_, *sums) in enumerate(by_rank):
        for name, found_sum, expected in zip(same, sums, by_rank[0][1:], strict=True):
            if found_sum != expected:
                raise KDError(
                    f"{name}: got other values on rank {rank} of the group than on rank 0; expected the same on all "
                    "ranks, with ids and labels of the whole vocabulary."
                )


def _check_values(call: Call, positions: int, width: int) -> None:
    alpha, t = call.numbers()
    check_numbers(alpha, t)
    check_temperature(t, call.targets.temperatures)
    if call.num_items is not None and not 0 <= call.num_items < _INF:
        raise KDError(f"num_items: got {call.num_items.item()}; expected a count.")
    index = call.targets.index
    if index is not None:
        _refuse((index < 0) | (index >= positions), "targets.index", index, f"positions from 0 to {positions - 1}")
        ordered = index.sort().values
        twice = torch.isin(index, ordered[1:][ordered[1:] == ordered[:-1]])
        _refuse(twice, "targets.index", index, "each position at most once")
    (call, counted), targets = call.by_row(positions), call.targets
    if call.labels is not None:
        outside = counted & ((call.labels < 0) | (call.labels >= width))
        expected = f"a number from 0 to {width - 1}, or {call.config.ignore_index}"
        _refuse(outside, "labels", call.labels, expected)
    if call.weights is not None:
        _refuse(counted & ~call.weights.isfinite(), "weights", call.weights, "a finite number")
    _check_targets(targets, counted)
    if targets.draws is not None:
        used = targets.logprobs > -_INF
        drawn = used & (targets.draws > 0)
        alone = counted & drawn.any(1) & ~(used & ~drawn).any(1)
        if call.treatment(t) != "sampled" and alone.any():
            row = int(alone.nonzero()[0, 0])
            raise KDError(
                f"treatment: row {row} has draws and no top-k entries, which {call.treatment(t)!r} cannot "
                "take; use treatment 'sampled'."
            )


def _check_targets(targets: SparseTargets, counted_P: Tensor) -> None:
    """The rows that count; the others may hold anything."""
    ids, logprobs, tail, vocab = targets.ids.long(), targets.logprobs, targets.tail, targets.vocab_size
    outcomes = targets.outcomes.expand(len(targets))
    used, empty = logprobs > -_INF, tail == -_INF
    outside = used & ((ids < 0) | (ids >= vocab))
    ordered = ids.masked_fill(~used, -1).sort(1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    logarithms = (
        f"logarithms of probabilities (0 or less; up to {LOGPROB_ROUNDING} passes for rounding), or -inf for unused "
        "entries"
    )
    stands_for = "the number of outcomes that the row's tail stands for, since it is not -inf"
    wrong = [
        (outside.any(1), "ids", ids, f"ids from 0 to {vocab - 1}"),
        (~(logprobs <= LOGPROB_ROUNDING).all(1), "logprobs", logprobs, logarithms),
        (~(tail < _INF).all(1), "tail", tail, "finite numbers, or -inf for an empty tail"),
        (empty.any(1) & ~empty.all(1), "tail", tail, "finite numbers at all temperatures, or -inf at all"),
        (twice.any(1), "ids", ids, "each id at most once in a row"),
        ((outcomes < 0) | (outcomes > vocab), "outcomes", outcomes, f"a count from 0 to {vocab}"),
        ((outcomes == 0) & ~empty.any(1), "outcomes", outcomes, stands_for),
    ]
    if targets.draws is not None:
        wrong.append(((used & (targets.draws < 0)).any(1), "draws", targets.draws, "counts, 0 for a top-k entry"))
    for bad_P, name, values, expected in wrong:
        _refuse(counted_P & bad_P, f"targets.{name}", values, expected)


def check_student(bad_C: Tensor, what: str, first_row: int = 0) -> None:
    """Raise KDError for a row that counts and whose logits hold NaN, +inf, or nothing but −inf."""
    if bad_C.any():
        raise KDError(
            f"{what}: row {first_row + int(bad_C.nonzero()[0, 0])} of those that count has NaN or infinite logits; "
            "expected finite ones (-inf only for masked tokens)."
        )


def _refuse(bad_P: Tensor, name: str, values: Tensor, expected: str) -> None:
    if bad_P.any():
        row = int(bad_P.nonzero()[0, 0])
        found = values[row].flatten()[:8].tolist()
        raise KDError(f"{name}: row {row} has {found}; expected {expected}.")
