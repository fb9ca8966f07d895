"""`masked`: text and documents without credentials, for everything that is written, logged or raised."""

import os
import re
from collections.abc import Mapping
from typing import Any

from ..cache.credentials import redact

_SECRET_NAME = re.compile(r"(?i)secret|passw|token|credential|(access|account|api|private|sas)_?key|signature")
_SHORTEST = 8  # characters of an environment variable's value, to be masked wherever it occurs


def masked(value: Any) -> Any:
    """The value with "…" for the credentials in its texts; mappings, lists and tuples are masked within.

    Masked are user:password@ and the query of every URL, values that follow names like password or token, and the
    values of environment variables with such names. Keys of mappings are kept.
    """
    if isinstance(value, str):
        for name, secret in os.environ.items():
            found = len(secret) >= _SHORTEST and secret in value and _SECRET_NAME.search(name)
            if found and not os.path.exists(secret):  # the folder of a key is none
                value = value.replace(secret, "…")
        return redact(value)
    if isinstance(value, Mapping):
        return {key: masked(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked(inner) for inner in value]
    return value
