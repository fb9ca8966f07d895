"""From the values of a column to token ids, with every value checked; errors name the row."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..cache.errors import type_name
from ..errors import DataError
from .columns import Values
from .records import Completion

Where = Callable[[int], str]
"""The location of a value, ending in ": ", by its number among those given."""


def flat_ids(values: Values, where: Where) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Lists of integers as one array of ids `[tokens]`, and the length of each list, `[documents]`."""
    return _arrow_ids(values, where) if isinstance(values, pa.Array) else _list_ids(values, where)


def check_range(ids: NDArray[Any], lengths: NDArray[np.int64], vocab_size: int, where: Where) -> None:
    """DataError for ids outside 0 to vocab_size − 1."""
    if not len(bad := np.flatnonzero((ids < 0) | (ids >= vocab_size))):
        return
    row, position = _row_of(int(bad[0]), lengths)
    raise DataError(
        f"{where(row)}got id {ids[bad[0]]} at position {position}; expected 0 to {vocab_size - 1}, the ids of the "
        "teacher's LM head. Is this the teacher's tokenizer?"
    )


def texts_or_chats(values: Values, where: Where, *, chats: bool) -> list[Any]:
    """A column of text as strings (or `Completion`s), or a column of conversations as lists of messages."""
    if isinstance(values, pa.Array):
        try:
            values = values.to_pylist()
        except (pa.ArrowException, ValueError) as error:  # names that are no text, times that are none
            raise DataError(f"{where(0)}this row or one after it cannot be read ({error}).") from error
    for row, value in enumerate(values):
        if value is None:
            raise _null(where(row))
        parts = isinstance(value, Completion)  # which is a tuple
        if not (isinstance(value, (list, tuple)) and not parts if chats else isinstance(value, str) or parts):
            kind = type(value).__name__
            hint = " (ids need no tokenizer: leave it out)" if kind == "list" else ""
            hint = " (with a template)" if kind == "str" else hint
            raise DataError(f"{where(row)}got {kind}; expected {'messages' if chats else 'text'}{hint}.")
    return list(values)


def _arrow_ids(values: pa.Array, where: Where) -> tuple[NDArray[Any], NDArray[np.int64]]:
    kind = values.type
    if not len(values):
        return np.empty(0, np.int32), np.empty(0, np.int64)
    if values.null_count:
        raise _null(where(int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])))
    if pa.types.is_fixed_size_list(kind):
        values, kind = values.cast(pa.list_(kind.value_type)), pa.list_(kind.value_type)
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_integer(kind.value_type):
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        raise DataError(f"{where(0)}got {kind}; expected lists of integers{', or a tokenizer' if is_text else ''}.")
    lengths = np.diff(values.offsets.to_numpy()).astype(np.int64)
    flat = values.flatten()
    if flat.null_count:
        row, position = _row_of(int(np.flatnonzero(flat.is_null().to_numpy(zero_copy_only=False))[0]), lengths)
        raise DataError(f"{where(row)}got null at position {position}; expected an id.")
    return flat.to_numpy(), lengths


def _list_ids(values: Sequence[Any], where: Where) -> tuple[NDArray[Any], NDArray[np.int64]]:
    arrays = []
    for row, value in enumerate(values):
        if value is None:
            raise _null(where(row))
        if isinstance(value, (str, bytes, dict)):
            hint = ", or a tokenizer" if isinstance(value, str) else ""
            raise DataError(f"{where(row)}got {type_name(value)}; expected a list of integers{hint}.")
        try:
            array = np.asarray(value)
        except (ValueError, TypeError, RuntimeError) as error:
            raise DataError(f"{where(row)}got {type_name(value)} ({error}); expected a list of integers.") from error
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            got = f"{array.dtype} of {array.ndim} dimensions" if array.ndim != 1 else _first_bad(value)
            raise DataError(f"{where(row)}got {got}; expected a list of integers.")
        arrays.append(array if array.size else np.empty(0, np.int32))
    lengths = np.array([len(array) for array in arrays], np.int64)
    return np.concatenate(arrays) if arrays else np.empty(0, np.int32), lengths


def _first_bad(values: Any) -> str:
    """The first value that is not an integer."""
    for position, value in enumerate(values):
        if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
            return f"{'null' if value is None else type(value).__name__} at position {position}"
    return "numbers too large for any integer type"


def _row_of(index: int, lengths: NDArray[np.int64]) -> tuple[int, int]:
    """The document that a token of the concatenated documents belongs to, and its position there."""
    row = int(np.searchsorted(np.cumsum(lengths), index, side="right"))
    return row, index - int(lengths[:row].sum())


def _null(where: str) -> DataError:
    return DataError(f"{where}got null; expected a document. Drop such rows.")
