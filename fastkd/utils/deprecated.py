"""Settings and functions of earlier versions: what still works warns, and what was removed says what to do instead."""

import warnings


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
