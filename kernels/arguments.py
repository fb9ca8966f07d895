"""Checks of single arguments: whole numbers, real numbers, 0-d tensors, and no DTensors.

Imports torch only for what may be a tensor.
"""

import operator
from numbers import Real
from typing import Any

from .errors import KDError


def describe(value: Any) -> str:
    """What an argument is, for a message."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{tuple(value.shape)} {value.dtype}"
    return f"{repr(value)[:40]} ({type(value).__name__})"


def refuse_dtensor(name: str, value: Any) -> None:
    """Raise KDError for a DTensor: a kernel would take this rank's part for the whole tensor."""
    # by name: the module takes a second to import
    if type(value).__name__ == "DTensor":
        whole = ".redistribute(placements=[Replicate()])" if name == "hidden" else ""  # the same on all ranks
        raise KDError(
            f"{name}: got a DTensor {tuple(value.shape)} {value.dtype}, placed {value.placements}; expected a plain "
            "tensor. Call inside the forward of the module that is wrapped (FSDP gathers its "
            f"weights there); or pass {name}{whole}.to_local() on each rank, for a vocabulary that is divided over "
            "ranks with group=."
        )


def whole_number(name: str, value: Any, expected: str, least: int | None = None) -> Any:
    """An int (or torch's symbol for one) from any integer type, NumPy's included. Raises KDError for others, and below
    `least`.

    expected: what the number means, for the message.
    """
    number = value
    if type(value) is not int:
        import torch

        if not isinstance(value, torch.SymInt):
            if isinstance(value, (bool, torch.Tensor)) or not hasattr(value, "__index__"):
                raise KDError(f"{name}: got {describe(value)}; expected {expected}.")
            number = operator.index(value)
    if not -(2**63) <= number < 2**63:
        raise KDError(f"{name}: got {number}; expected {expected} below 2^63.")
    if least is not None and number < least:
        raise KDError(f"{name}: got {number}; expected {expected}, at least {least}.")
    return number


def is_number(name: str, value: Any) -> bool:
    """True for a real number, False for a 0-d tensor of real numbers. Raises KDError for all else."""
    if isinstance(value, Real):
        return True
    import torch

    if not isinstance(value, torch.Tensor):
        raise KDError(f"{name}: got {describe(value)}; expected a number or a 0-d tensor.")
    refuse_dtensor(name, value)
    if value.ndim:
        raise KDError(f"{name}: got a tensor of shape {tuple(value.shape)}; expected a number or a 0-d tensor.")
    if value.is_complex() or value.dtype == torch.bool:
        raise KDError(f"{name}: got a tensor of {value.dtype}; expected a real number.")
    return False
