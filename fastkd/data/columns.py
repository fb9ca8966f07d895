"""One column of documents, by row number, from each kind of file: nothing here holds a whole dataset in memory.

A column yields Arrow arrays where the format is Arrow's, else lists of Python values. What the values have to be is
checked where they become tokens (documents.py). Files of lines: lines.py. Columns are for one thread at a time.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from ..errors import DataError

Values: TypeAlias = "pa.Array | list[Any]"

CONVENTIONAL = ("input_ids", "tokens", "text", "messages")  # the columns that need not be named
READ_BYTES = 2**23  # bytes read, or decoded, at a time


class Column(Protocol):
    """Rows of one column."""

    name: str
    """The column's name; empty where there is none."""
    row_bytes: float
    """What a row takes, about: how many are read at a time follows from it."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Values:
        """The values of rows start to stop."""
        ...

    def where(self, row: int) -> str:
        """The row, as a person finds it."""
        ...


class ParquetColumn:
    """A column of a Parquet file. Its row groups are decoded a few rows at a time, from a place that only goes on."""

    def __init__(self, path: Path, column: str | None) -> None:
        self.path = path
        with naming(path, "Parquet"):
            # without a buffer a row group's whole column would be read at once
            self._file = pq.ParquetFile(path, buffer_size=2**20)
        self.name = choose_column(str(path), self._file.schema_arrow.names, column)
        metadata = self._file.metadata
        groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
        self._begins = np.cumsum([0, *(group.num_rows for group in groups)])
        size = sum(
            group.column(c).total_uncompressed_size
            for group in groups
            for c in range(group.num_columns)
            if group.column(c).path_in_schema.split(".")[0] == self.name
        )
        self.row_bytes = size / max(1, len(self))
        self._group, self._first, self._batch = -1, 0, pa.nulls(0)
        self._iterator: Iterator[pa.RecordBatch] = iter(())

    def __len__(self) -> int:
        return int(self._begins[-1])

    def read(self, start: int, stop: int) -> pa.Array:
        parts = []
        with naming(self.path, "Parquet", f"rows {start} to {stop}"):
            while start < stop:
                self._go_to(start)
                part = self._batch.slice(start - self._first, stop - start)
                parts.append(part)
                start += len(part)
        return joined(parts)

    def where(self, row: int) -> str:
        return f"{self.path}, row {row} (from 0)"

    def _go_to(self, row: int) -> None:
        """Make the batch with that row the present one."""
        group = int(np.searchsorted(self._begins, row, side="right")) - 1
        if group != self._group or row < self._first:
            self._group, self._first, self._batch = group, int(self._begins[group]), pa.nulls(0)
            count = rows_at_a_time(self.row_bytes)
            self._iterator = self._file.iter_batches(count, row_groups=[group], columns=[self.name])
        while row >= self._first + len(self._batch):
            self._first += len(self._batch)
            batch = next(self._iterator, None)
            if batch is None:
                raise pa.ArrowInvalid(f"row group {group} ends before row {row}")
            self._batch = batch.column(0)


class ArrowColumn:
    """A column of an Arrow file or stream (Feather, a Hugging Face cache), mapped into memory.

    One record batch of a compressed file is decoded at a time; a compressed stream, which nobody writes for keeping,
    would be decoded whole.
    """

    def __init__(self, path: Path, column: str | None) -> None:
        self.path = path
        with naming(path, "Arrow"):
            source = pa.memory_map(str(path))
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            opened = pa.ipc.open_file if is_file else pa.ipc.open_stream
            names = opened(source).schema.names
            self.name = choose_column(str(path), names, column)
            source.seek(0)
            options = pa.ipc.IpcReadOptions(included_fields=[names.index(self.name)])
            reader = opened(source, options=options)
            if is_file:
                self._batches: Any = reader
                count = reader.num_record_batches
                sizes = [reader.get_batch(b).num_rows for b in range(count)]
            else:
                self._batches = list(reader)
                sizes = [batch.num_rows for batch in self._batches]
        self._begins = np.cumsum([0, *sizes])
        self.row_bytes = path.stat().st_size / max(1, len(self))
        self._number, self._batch = -1, pa.nulls(0)

    def __len__(self) -> int:
        return int(self._begins[-1])

    def read(self, start: int, stop: int) -> pa.Array:
        parts = []
        with naming(self.path, "Arrow", f"rows {start} to {stop}"):
            while start < stop:
                number = int(np.searchsorted(self._begins, start, side="right")) - 1
                if number != self._number:
                    found = self._batches
                    batch = found[number] if isinstance(found, list) else found.get_batch(number)
                    self._number, self._batch = number, batch.column(0)
                part = self._batch.slice(start - int(self._begins[number]), stop - start)
                parts.append(part)
                start += len(part)
        return joined(parts)

    def where(self, row: int) -> str:
        return f"{self.path}, row {row} (from 0)"


def rows_at_a_time(row_bytes: float) -> int:
    """How many rows of that size are read, or decoded, at a time."""
    return int(min(2**14, max(1, READ_BYTES // max(1.0, row_bytes))))


def choose_column(where: str, names: Sequence[str], column: str | None) -> str:
    """The column that was asked for; where none was, the only one, or the only one of a conventional name."""
    listed = ", ".join(map(repr, names)) or "no columns at all"
    if column is not None:
        if column not in names:
            raise DataError(f"{where}: there is no column {column!r}. It has {listed}.")
        return column
    usual = [name for name in names if name in CONVENTIONAL]
    for few in (names, usual):
        if len(few) == 1:
            return few[0]
    raise DataError(f"{where}: which column holds the documents? It has {listed}. Name one with column=.")


def joined(parts: Sequence[pa.Array]) -> pa.Array:
    if not parts:
        return pa.nulls(0)
    return parts[0] if len(parts) == 1 else pa.concat_arrays(parts)


class naming:
    """Whatever a library says of a file, with the file's name before it."""

    def __init__(self, path: Path, kind: str, part: str = "") -> None:
        self.path, self.kind, self.part = path, kind, part

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, FileNotFoundError):
            raise DataError(f"{self.path}: there is no such file.") from error
        if isinstance(error, (pa.ArrowException, OSError)):
            part = f"{self.part}: " if self.part else ""
            raise DataError(
                f"{self.path}: {part}cannot be read as {self.kind} ({' '.join(str(error).split())}). It may be "
                "truncated or of another kind: fetch it again, or leave it out."
            ) from error
