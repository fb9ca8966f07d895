"""Rows of several columns that are one document: Alpaca's instruction, input and output, and prompt with completion.

Of a table without a column of documents (see `choose_column`), these names say what its rows are; `conversations`, as
of ShareGPT, is one column, whose messages `chat.py` reads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from ..cache.errors import said
from ..errors import DataError
from .columns import Column


class Completion(NamedTuple):
    """A document of text in two parts. With loss_on="assistant", the positions of the second one count."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Shape:
    """Columns of a document. optional: those that may be missing, of those. join: a row's values to a document; it
    raises ValueError, saying what it got and expected."""

    columns: tuple[str, ...]
    optional: tuple[str, ...]
    join: Callable[[Mapping[str, Any]], Any]


def _alpaca(row: Mapping[str, Any]) -> list[dict[str, str]]:
    asked = [_text(row, "instruction"), *([found] if (found := _text(row, "input")) else [])]
    return [
        {"role": "user", "content": "\n\n".join(asked)},
        {"role": "assistant", "content": _text(row, "output")},
    ]


def _completion(row: Mapping[str, Any]) -> Any:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, (list, tuple)) and isinstance(completion, (list, tuple)):
        return [*prompt, *completion]  # messages
    return Completion(_text(row, "prompt"), _text(row, "completion"))


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None and name == "input":
        return ""
    if not isinstance(value, str):
        raise ValueError(f"got {'null' if value is None else type(value).__name__} in column {name!r}; expected text")
    return value


SHAPES = (
    Shape(("instruction", "input", "output"), ("input",), _alpaca),
    Shape(("prompt", "completion"), (), _completion),
)


def shape_of(names: Sequence[str]) -> Shape | None:
    """What rows with these columns are; None if it is not known, or not clear."""
    found = [shape for shape in SHAPES if set(shape.columns) - set(shape.optional) <= set(names)]
    return found[0] if len(found) == 1 else None


class JoinedColumn:
    """Rows of several columns as one. columns: by their names, of the same rows."""

    def __init__(self, shape: Shape, columns: Mapping[str, Column]) -> None:
        self._shape, self._columns = shape, dict(columns)
        self.name = "+".join(name for name in shape.columns if name in columns)
        self._first = next(iter(columns.values()))

    def __len__(self) -> int:
        return len(self._first)

    def where(self, row: int) -> str:
        return self._first.where(row)

    def read(self, start: int, stop: int) -> list[Any]:
        parts = {}
        for name, column in self._columns.items():
            values = column.read(start, stop)
            stop = min(stop, start + len(values))
            parts[name] = values
        try:
            plain = {n: v.to_pylist() if isinstance(v, pa.Array) else v for n, v in parts.items()}
        except (pa.ArrowException, ValueError) as error:
            raise DataError(f"{self.where(start)} or after it: cannot be read ({error}).") from error
        found = []
        for row in range(stop - start):
            try:
                found.append(self._shape.join({name: values[row] for name, values in plain.items()}))
            except ValueError as error:
                raise DataError(f"{self.where(start + row)}: {said(error)}.") from error
        return found
