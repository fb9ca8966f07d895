"""Checks of a call: shapes and types always, the values inside tensors where reading them costs no wait."""

import os
from typing import Any

import torch
from torch import Tensor

from ..arguments import describe, is_number
from ..errors import KDError
from ..tail import check_temperature
from ..targets import FLOATS, INTEGER_TYPE, INTEGERS, SparseTargets
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
    values are checked on the CPU, and on every device by the implementations `torch` and `reference`, which synchronize
    anyway. The Triton kernels on a GPU read and write nothing out of bounds, and a row with a bad id, label,
    log-probability or setting has the loss NaN. They do not detect an id twice in a row, or a position twice in
    `targets.index` (both give a wrong loss and gradient), outcomes or draws that are no counts, and log-probabilities
    above 0.
    """
    global _debug
    _debug = enabled


def values_are_checked(device: torch.device) -> bool:
    """Whether calls of the Triton kernels on this device check the values inside tensors."""
    return _debug or device.type == "cpu"


def check_floats(name: str, value: Any) -> None:
    """Raise KDError unless it is a dense tensor of a floating-point type that the loss supports."""
    if not isinstance(value, Tensor) or value.dtype not in FLOATS or value.layout != torch.strided:
        raise KDError(
            f"{name}: got {describe(value)}; expected a dense tensor of float16, bfloat16, float32 or float64."
        )


def overlaps(tensor: Tensor) -> bool:
    """Whether elements of a tensor may share memory, as those of an expanded one do."""
    # each dimension has to step over all elements of the finer ones
    steps = [(stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
    for i, (stride, _) in enumerate(steps):
        finer = (s * (n - 1) for j, (s, n) in enumerate(steps) if s < stride or (s == stride and j < i))
        if stride <= sum(finer):
            return True
    return False


def check_constant(name: str, tensor: Tensor) -> None:
    """Raise KDError for a tensor that requires a gradient: the loss has gradients in the student alone."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise KDError(f"{name}: got a tensor that requires a gradient; expected a constant. Pass {name}.detach().")


def check_rows(
    what: str,
    leading: tuple[int, ...],
    width: int,
    device: torch.device,
    targets: SparseTargets,
    labels: Tensor | None,
    mask: Tensor | None,
    weights: Tensor | None,
    num_items: int | Tensor | None,
) -> None:
    """Raise KDError if the arguments of one call do not fit each other. leading: the shape over positions."""
    check_constant("targets.logprobs", targets.logprobs)
    check_constant("targets.tail", targets.tail)
    if width < targets.vocab_size:
        raise KDError(
            f"{what}: got {width} logits a position, narrower than the targets' vocabulary; expected at least "
            f"{targets.vocab_size}, one for each of the teacher's tokens (a wider, padded LM head is allowed)."
        )
    positions = 1
    for size in leading:
        positions *= size
    if targets.index is None and len(targets) != positions:
        raise KDError(
            f"targets: got {len(targets)} rows for {what} over {leading} = {positions} positions; pass a row for "
            "each position, or compact targets with an index."
        )
    if targets.index is not None and len(targets) > positions:
        raise KDError(f"targets.index: got {len(targets)} rows for {what} over {positions} positions.")
    for name, tensor in (("labels", labels), ("mask", mask), ("weights", weights)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise KDError(f"{name}: got {type(tensor).__name__}; expected a tensor.")
        if tuple(tensor.shape) != leading:
            raise KDError(f"{name}: got shape {tuple(tensor.shape)}; expected {leading}, as of {what}.")
        if tensor.device != device:
            raise KDError(f"{name}: got a tensor on {tensor.device}, {what} on {device}; move it there.")
    if labels is not None and labels.dtype not in INTEGERS:
        raise KDError(f"labels: got {labels.dtype}; expected {INTEGER_TYPE}.")
    if mask is not None and mask.dtype != torch.bool:
        raise KDError(f"mask: got {mask.dtype}; expected torch.bool.")
    if weights is not None:
        if weights.dtype not in FLOATS:
            raise KDError(f"weights: got {weights.dtype}; expected a floating-point type.")
        check_constant("weights", weights)
    if targets.device != device:
        raise KDError(f"targets: got tensors on {targets.device}, {what} on {device}; use targets.to({str(device)!r}).")
    if isinstance(num_items, Tensor):
        is_number("num_items", num_items)
        check_constant("num_items", num_items)
    elif num_items is not None and num_items < 0:
        raise KDError(f"num_items: got {num_items}; expected the whole step's count.")


def check_values(call: Call, positions: int, width: int) -> None:
    """Raise KDError naming the row and the argument of the first bad value in the tensors of a call."""
    alpha, t = call.numbers()
    check_numbers(alpha, t)
    check_temperature(t, call.temperatures)
    if call.num_items is not None and not call.num_items >= 0:
        raise KDError(f"num_items: got {call.num_items.item()}; expected a count.")
    if call.positions is not None:
        outside = (call.positions < 0) | (call.positions >= positions)
        _refuse(outside, "targets.index", call.positions, f"positions from 0 to {positions - 1}")
        ordered = call.positions.sort().values
        twice = torch.isin(call.positions, ordered[1:][ordered[1:] == ordered[:-1]])
        _refuse(twice, "targets.index", call.positions, "each position at most once")
    call = call.by_row()
    counted = call.counted()
    if call.labels is not None:
        outside = counted & ((call.labels < 0) | (call.labels >= width))
        expected = f"a number from 0 to {width - 1}, or {call.config.ignore_index}"
        _refuse(outside, "labels", call.labels, expected)
    if call.weights is not None:
        _refuse(counted & ~call.weights.isfinite(), "weights", call.weights, "a finite number")
    _check_targets(call, counted)
    if call.draws is not None:
        used = call.logprobs > -_INF
        drawn = used & (call.draws > 0)
        alone = counted & drawn.any(1) & ~(used & ~drawn).any(1)
        if call.treatment(t) != "sampled" and alone.any():
            row = int(alone.nonzero()[0, 0])
            raise KDError(
                f"treatment: row {row} has draws and no top-k entries, which {call.treatment(t)!r} cannot "
                "take; use treatment 'sampled'."
            )


def _check_targets(call: Call, counted_P: Tensor) -> None:
    """The rows that count of a call by row; the others may hold anything."""
    ids, logprobs, tail, outcomes = call.ids.long(), call.logprobs, call.tail, call.outcomes.expand(call.rows)
    used = logprobs > -_INF
    outside = used & ((ids < 0) | (ids >= call.vocab_size))
    ordered = ids.masked_fill(~used, -1).sort(1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    empty = tail == -_INF
    wrong = [
        (outside, "ids", ids, f"ids from 0 to {call.vocab_size - 1}"),
        (
            ~(logprobs <= LOGPROB_ROUNDING),
            "logprobs",
            logprobs,
            f"logarithms of probabilities (0 or less; up to {LOGPROB_ROUNDING} passes for rounding), or -inf for "
            "unused entries",
        ),
        (tail.isnan() | (tail == _INF), "tail", tail, "finite numbers, or -inf for an empty tail"),
        (
            empty != empty[:, :1],
            "tail",
            tail,
            "finite numbers at all temperatures, or -inf at all for an empty tail",
        ),
        (twice, "ids", ids, "each id at most once in a row"),
        (
            ((outcomes < 0) | (outcomes > call.vocab_size))[:, None],
            "outcomes",
            outcomes,
            f"a count from 0 to {call.vocab_size}",
        ),
        (
            ((outcomes == 0) & ~empty.any(1))[:, None],
            "outcomes",
            outcomes,
            "the number of outcomes that the row's tail stands for, since it is not -inf",
        ),
    ]
    if call.draws is not None:
        wrong.append((used & (call.draws < 0), "draws", call.draws, "counts, 0 for a top-k entry"))
    for bad_PX, name, values, expected in wrong:
        _refuse(counted_P & bad_PX.any(1), f"targets.{name}", values, expected)


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
