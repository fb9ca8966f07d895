"""What is wrong with a call: shapes and settings always, the values inside tensors where reading them is free."""

import os

import torch
from torch import Tensor

from .call import DIVERGENCES, IMPLEMENTATIONS, Call
from .errors import KDError
from .tail import check_temperature
from .targets import TREATMENTS, SparseTargets, sampled_reach

_debug = os.environ.get("FASTKD_DEBUG", "0") not in ("", "0")


def set_debug(enabled: bool) -> None:
    """Check the values inside tensors on every device, at the price of synchronising with it.

    Off (unless the environment has FASTKD_DEBUG=1): values are checked on the CPU; on a GPU nothing is read or written
    out of bounds and a row with a bad value has the loss NaN. On: the call raises KDError naming row and argument.
    """
    global _debug
    _debug = enabled


def values_are_checked(device: torch.device) -> bool:
    """Whether a call on this device looks inside its tensors."""
    return _debug or device.type == "cpu"


def check_settings(
    targets: SparseTargets,
    *,
    alpha: float | Tensor,
    temperature: float | Tensor,
    divergence: str,
    treatment: str,
    beta: float,
    skew: float,
    impl: str,
) -> None:
    """Raise KDError for a setting that no input could make right."""
    for name, value, allowed in (
        ("divergence", divergence, DIVERGENCES),
        ("treatment", treatment, TREATMENTS),
        ("impl", impl, IMPLEMENTATIONS),
    ):
        if value not in allowed:
            raise KDError(f"{name}: found {value!r}; one of {', '.join(allowed)} is needed.")
    if divergence != "forward_kl" and treatment not in ("auto", "bucket"):
        raise KDError(
            f"treatment: found {treatment!r} with divergence {divergence!r}, which needs the teacher's probability "
            "wherever the student puts mass; use treatment 'bucket' (or 'auto'), or divergence 'forward_kl'."
        )
    for name, number in (("beta", beta), ("skew", skew)):
        if not 0 < number < 1:
            raise KDError(f"{name}: found {number}; a number strictly between 0 and 1 is needed.")
    _check_scalar("alpha", alpha)
    _check_scalar("temperature", temperature)
    if not isinstance(alpha, Tensor) and not 0 <= alpha <= 1:
        raise KDError(f"alpha: found {alpha}; a number from 0 (soft loss alone) to 1 (hard loss alone) is needed.")
    if not isinstance(temperature, Tensor):
        check_temperature(temperature, targets.temperatures)


def _check_scalar(name: str, value: float | Tensor) -> None:
    if isinstance(value, Tensor) and value.ndim:
        raise KDError(f"{name}: found a tensor of shape {tuple(value.shape)}; a number or a 0-d tensor is needed.")


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
    """Raise KDError where the arguments of one call do not fit each other. `leading`: the shape over positions."""
    if width < targets.vocab_size:
        raise KDError(
            f"{what}: found a head of {width} outcomes, narrower than the targets' vocabulary of {targets.vocab_size}; "
            "a student must have an outcome for each of the teacher's (a wider, padded head is allowed)."
        )
    positions = 1
    for size in leading:
        positions *= size
    if targets.index is None and len(targets) != positions:
        raise KDError(
            f"targets: found {len(targets)} rows for {what} over {leading} = {positions} positions; pass a row for "
            "each position, or compact targets with an index."
        )
    if targets.index is not None and len(targets) > positions:
        raise KDError(f"targets.index: found {len(targets)} rows for {what} over {positions} positions.")
    for name, tensor in (("labels", labels), ("mask", mask), ("weights", weights)):
        if tensor is None:
            continue
        if tuple(tensor.shape) != leading:
            raise KDError(f"{name}: found shape {tuple(tensor.shape)}; {leading}, as of {what}, is needed.")
        if tensor.device != device:
            raise KDError(f"{name}: found on {tensor.device}, {what} on {device}; move it there.")
    if labels is not None and (labels.is_floating_point() or labels.dtype == torch.bool):
        raise KDError(f"labels: found {labels.dtype}; an integer type is needed.")
    if mask is not None and mask.dtype != torch.bool:
        raise KDError(f"mask: found {mask.dtype}; torch.bool is needed.")
    if weights is not None and not weights.is_floating_point():
        raise KDError(f"weights: found {weights.dtype}; a floating-point type is needed.")
    if targets.device != device:
        raise KDError(f"targets: found on {targets.device}, {what} on {device}; use targets.to({str(device)!r}).")
    if isinstance(num_items, Tensor):
        if num_items.ndim:
            raise KDError(f"num_items: found a tensor of shape {tuple(num_items.shape)}; a 0-d tensor is needed.")
    elif num_items is not None and (not isinstance(num_items, (int, torch.SymInt)) or num_items < 0):
        raise KDError(f"num_items: found {num_items!r}; an int or a 0-d tensor, the whole step's count, is needed.")


def check_values(call: Call, positions: int, width: int) -> None:
    """Raise KDError naming the row and the argument of the first bad value in the tensors of a call."""
    alpha, temperature = call.alpha_now(), call.temperature_now()
    if not 0 <= alpha <= 1:
        raise KDError(f"alpha: found {alpha}; a number from 0 to 1 is needed.")
    check_temperature(temperature, tuple(call.temperatures))
    if call.num_items is not None and not call.num_items >= 0:
        raise KDError(f"num_items: found {call.num_items.item()}; a count is needed.")
    if call.positions is not None:
        outside = (call.positions < 0) | (call.positions >= positions)
        _refuse(outside, "targets.index", call.positions, f"a position from 0 to {positions - 1} is needed")
        ordered = call.positions.sort().values
        twice = torch.isin(call.positions, ordered[1:][ordered[1:] == ordered[:-1]])
        _refuse(twice, "targets.index", call.positions, "each position at most once is needed")
    call = call.by_row()
    counted = call.counted()
    if call.labels is not None:
        outside = counted & ((call.labels < 0) | (call.labels >= width))
        _refuse(outside, "labels", call.labels, f"a number from 0 to {width - 1}, or {call.ignore_index}, is needed")
    if call.weights is not None:
        _refuse(counted & ~call.weights.isfinite(), "weights", call.weights, "a finite number is needed")
    used = call.logprobs > -float("inf")
    ids = call.ids.long()
    outside = used & ((ids < 0) | (ids >= call.vocab_size))
    _refuse(outside.any(1), "targets.ids", call.ids, f"ids from 0 to {call.vocab_size - 1} are needed")
    not_number = call.logprobs.isnan() | (call.logprobs == float("inf"))
    _refuse(
        not_number.any(1), "targets.logprobs", call.logprobs, "finite numbers, or -inf in unused places, are needed"
    )
    not_number = call.tail.isnan() | (call.tail == float("inf"))
    _refuse(not_number.any(1), "targets.tail", call.tail, "finite numbers, or -inf for an empty tail, are needed")
    ordered = call.ids.long().masked_fill(~used, -1).sort(1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    _refuse(twice.any(1), "targets.ids", call.ids, "each id at most once in a row is needed")
    if call.draws is not None:
        sampled = call.treatment == "sampled" or (
            call.treatment == "auto" and temperature <= sampled_reach(call.draw_temperature)
        )
        drawn = used & (call.draws > 0)
        alone = drawn.any(1) & ~(used & ~drawn).any(1)
        if not sampled and alone.any():
            row = int(alone.nonzero()[0, 0])
            raise KDError(
                f"treatment: row {row} of the targets has draws and no exact head, which "
                f"{call.treatment if call.treatment != 'auto' else 'bucket'!r} cannot take; use treatment 'sampled'."
            )


def check_student(bad_C: Tensor, what: str, first_row: int = 0) -> None:
    """Raise KDError for a row that counts and whose logits hold NaN, +inf, or nothing but −inf."""
    if bad_C.any():
        raise KDError(
            f"{what}: row {first_row + int(bad_C.nonzero()[0, 0])} of those that count has NaN or infinite logits; "
            "finite ones are needed (-inf only for masked outcomes)."
        )


def _refuse(bad_P: Tensor, name: str, values: Tensor, needed: str) -> None:
    if bad_P.any():
        row = int(bad_P.nonzero()[0, 0])
        found = values[row].flatten()[:8].tolist()
        raise KDError(f"{name}: row {row} has {found}; {needed}.")
