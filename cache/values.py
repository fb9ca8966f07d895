"""Checks of single values: each returns the value as Python's own int or float, or raises CacheError."""

import math
from typing import Any

from .errors import CacheError


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """An integer from low to high, both included."""
    good = not isinstance(value, bool) and hasattr(value, "__index__") and int(value) >= low
    if not good or (high is not None and int(value) > high):
        limit = "on" if high is None else f"to {high:,}"
        raise CacheError(f"{name}: got {value!r}; expected an integer from {low} {limit}.")
    return int(value)


def number(name: str, value: Any) -> float:
    """A number, which may be infinite or NaN."""
    try:
        if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
            raise ValueError
        return float(value)
    except (ValueError, OverflowError, TypeError):
        raise CacheError(f"{name}: got {value!r}; expected a number.") from None


def positive(name: str, value: Any) -> float:
    """A finite number above 0."""
    found = number(name, value)
    if not 0 < found < math.inf:
        raise CacheError(f"{name}: got {value!r}; expected a positive number.")
    return found
