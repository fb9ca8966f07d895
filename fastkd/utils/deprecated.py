"""Settings and functions of earlier versions: what still works warns, and what was removed says what to do instead."""

import warnings
from typing import TypeVar

T = TypeVar("T")


def deprecated_decode(value: str, error: type[Exception], *, stacklevel: int) -> None:
    """The setting `decode`, which said where targets are decoded: warn for "host", raise `error` for anything else.

    stacklevel: 1 warns at the line that calls this function, 2 at its caller's, and so on.
    """
    if value != "host":
        raise error(f"decode: got {value!r}; expected no value. Targets are always decoded on the host now.")
    warnings.warn(
        "decode: targets are always decoded on the host now; leave this setting out.",
        DeprecationWarning,
        stacklevel=stacklevel + 1,
    )


def renamed(old: str, new: str, value: T, *, stacklevel: int) -> T:
    """The value of an argument given by its old name, with a warning. stacklevel: as for `deprecated_decode`."""
    warnings.warn(f"{old}: this argument is now named {new}.", DeprecationWarning, stacklevel=stacklevel + 1)
    return value
