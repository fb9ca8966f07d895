"""From a source (files, a Hugging Face Dataset, or values in memory) to its columns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..cache.errors import type_name
from ..errors import DataError
from .columns import (
    LOSS_MASK,
    Column,
    ParquetColumn,
    UnclearColumn,
    Values,
    checked_rows,
    choose_column,
    concat_arrays,
)
from .files import check_one_kind, files_of, kind_of, open_column
from .json_files import JsonColumn
from .lines import TEXT_DOCUMENTS, LinesColumn, TextColumn
from .records import JoinedColumn, shape_of

_ROWS = 1024  # of values in memory at a time


@dataclass(frozen=True, eq=False)
class Source:
    """An opened source: its columns, one after the other, and its files (none for a Dataset or values in memory).
    left_out: files in its folders that are not read; see `files_of`."""

    columns: list[Column]
    files: list[Path]
    left_out: list[Path] = field(default_factory=list)

    @property
    def text_documents(self) -> str | None:
        """What a document of its text files is, see `TextColumn`; None without text files."""
        return next((column.documents for column in self.columns if isinstance(column, TextColumn)), None)

    @property
    def stated(self) -> dict[str, str]:
        """What the metadata of its files state of their token ids; see `ParquetColumn`. DataError if files differ."""
        found = [getattr(column, "stated", {}) for column in self.columns]
        for path, other in zip(self.files, found, strict=False):
            if other != found[0]:
                raise DataError(
                    f"{path}: its metadata state {other}, and those of {self.files[0]} {found[0]}; expected the same "
                    "in all files."
                )
        return found[0] if found else {}

    def loss_masks(self) -> list[Column]:
        """The column of loss masks beside each column of token ids; none if the files have none."""
        name = self.stated.get(LOSS_MASK)
        return [] if name is None else [ParquetColumn(path, name) for path in self.files]


class RowsColumn:
    """Values in memory: a sequence, a NumPy array of rows or an Arrow array; or a column of an Arrow table, or of
    anything else whose slices are Arrow tables. names: of the columns, if there are any. what, unit: for messages."""

    def __init__(self, values: Any, names: list[str] | None, column: str | None, what: str, unit: str) -> None:
        self.name = ""
        if names is not None:
            self.name = choose_column(what, names, column)
        elif column is not None:
            raise DataError(f"column: got {column!r}; {type(values).__name__} in memory has no columns. Leave it out.")
        self._values, self._what = values, f"{what}, {unit}"

    def __len__(self) -> int:
        return len(self._values)

    def read(self, start: int, stop: int) -> Values:
        try:
            part = self._values[start : min(stop, start + _ROWS)]
            if isinstance(part, (pa.Table, pa.RecordBatch)):
                part = part.column(self.name)
            elif self.name and part and isinstance(part[0], Mapping):
                part = self._picked(part, start)
            if isinstance(part, pa.ChunkedArray):
                part.validate(full=True)
                part = concat_arrays(part.chunks)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.where(start)} or after it: cannot be read ({error}).") from error
        return checked_rows(part, lambda: self.where(start)) if isinstance(part, pa.Array) else list(part)

    def where(self, row: int) -> str:
        return f"{self._what} {row} (from 0)"

    def _picked(self, rows: Sequence[Any], start: int) -> list[Any]:
        """The column's values of rows that are dictionaries."""
        for row, value in enumerate(rows, start):
            if not isinstance(value, Mapping) or self.name not in value:
                keys = ", ".join(map(repr, value)) if isinstance(value, Mapping) else type(value).__name__
                raise DataError(
                    f"{self.where(row)}: got {keys or 'no keys'}; expected a dictionary with {self.name!r}."
                )
        return [value[self.name] for value in rows]


def open_source(source: Any, column: str | None, text_documents: str = "line") -> Source:
    """Open a source, of which a `Source` is returned as it is.

    source, column, text_documents: see `open_documents`. Raises DataError for a source of an unknown kind, a file that
    cannot be opened, and for text_documents other than "line" without text files.
    """
    if isinstance(source, Source):
        return source
    if text_documents not in TEXT_DOCUMENTS:
        raise DataError(f"text_documents: got {text_documents!r}; expected one of {', '.join(TEXT_DOCUMENTS)}.")
    opened = _open(source, column, text_documents)
    if text_documents != "line" and opened.text_documents is None:
        raise DataError(
            f"text_documents: got {text_documents!r}, but no text files; in other data every row is a document. Leave "
            "it out."
        )
    return opened


def _open(source: Any, column: str | None, text_documents: str) -> Source:
    if isinstance(source, (str, Path)) or (_is_list(source) and all(isinstance(name, Path) for name in source)):
        found = files_of([source] if isinstance(source, (str, Path)) else source)
        check_one_kind(found.paths, text_documents)
        columns = [_named(partial(open_column, path, text_documents=text_documents), column) for path in found.paths]
        return Source(columns, found.paths, found.left_out)
    if _is_list(source) and isinstance(source[0], str) and _is_file(source[0]):
        # as a list of texts, the file names themselves would become tokens
        raise DataError(f"source: got a list of texts, and the first, {source[0]!r}, is a file; expected Paths.")
    if hasattr(source, "with_format") and hasattr(source, "column_names"):
        if isinstance(source.column_names, dict):
            splits = ", ".join(source.column_names)
            raise DataError(f"source: got a DatasetDict ({splits}); expected one split: dataset[split].")
        if not hasattr(source, "__len__"):
            raise DataError("source: got a streaming Dataset, which has no row numbers. Load it without streaming.")
        rows = source.with_format("arrow")
        return _in_memory(rows, source.column_names, column, "the Dataset", "row")
    if hasattr(source, "__len__") and hasattr(source, "__getitem__") and not isinstance(source, (dict, bytes)):
        names = source.schema.names if isinstance(source, (pa.Table, pa.RecordBatch)) else None
        if _is_list(source) and isinstance(source[0], Mapping):
            names = list(source[0])
        return _in_memory(source, names, column, "the data in memory", "document")
    raise DataError(
        f"source: got {type_name(source)}; expected a file, a folder, a pattern, a list of Paths, a Dataset, or a "
        "sequence of documents."
    )


def _named(open_one: Callable[[str | None], Column], column: str | None) -> Column:
    """The documents of a table: a column of it, or several that are known to belong together (records.py)."""
    try:
        return open_one(column)
    except UnclearColumn as error:
        if (shape := shape_of(error.names)) is None:
            raise
        names = [name for name in shape.columns if name in error.names]
        first = open_one(names[0])
        beside = first.beside if isinstance(first, LinesColumn) else open_one
        columns = {names[0]: first} | {name: beside(name) for name in names[1:]}
        if isinstance(first, JsonColumn):  # whose keys are those of the first object: others may have more, or less
            columns |= {name: first.optional(name) for name in shape.optional}
        return JoinedColumn(shape, columns)


def _in_memory(values: Any, names: list[str] | None, column: str | None, what: str, unit: str) -> Source:
    return Source([_named(lambda name: RowsColumn(values, names, name, what, unit), column)], [])


def _is_list(source: Any) -> bool:
    return isinstance(source, (list, tuple)) and bool(source)


def _is_file(text: str) -> bool:
    return len(text) < 1000 and kind_of(Path(text)) is not None and "\0" not in text and Path(text).is_file()
