"""One column of a dataset, read by row number. Columns of files never hold the whole column in memory.

Columns of Parquet and Arrow files return Arrow arrays, other columns lists of Python values. The values are checked
when they become tokens (token_ids.py). Text files: lines.py, json_files.py, csv_files.py. A column must be used from
one thread at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..errors import DataError

Values: TypeAlias = "pa.Array | list[Any]"

DEFAULT_COLUMNS = ("input_ids", "tokens", "text", "messages")  # used without column= if a table has one of them
CONVERSATIONS = "conversations"  # and this one if it has none of them
READ_BYTES = 2**23  # read, or decoded, at a time
LOSS_MASK, TEXT_SETTINGS = "fastkd.loss_mask", "fastkd.text_settings"
"""Keys of a Parquet file's metadata, for a column of token ids. The name of another column, of lists of booleans of the
same lengths: whether the teacher's distribution after each token counts. And what made the ids of text (tokenizer,
template, loss_on), as JSON; see `Documents.text_settings`."""


class UnclearColumn(DataError):
    """A table has several columns, and it is not clear which holds the documents. names: of the columns."""

    def __init__(self, message: str, names: Sequence[str]) -> None:
        super().__init__(message)
        self.names = list(names)


class Column(Protocol):
    """Rows of one column."""

    name: str
    """The column's name; empty if it has none."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Values:
        """The values of rows from start on, up to stop: as many as take a few megabytes, at least one."""

    def where(self, row: int) -> str:
        """The row's location, for messages."""


class _BatchColumn:
    """A column of a file that is read in Arrow batches, of which the last one is kept."""

    kind = ""
    name = ""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._starts = np.zeros(1, np.int64)  # first row of each row group or record batch, and the number of rows
        self._first, self._batch = 0, pa.nulls(0)  # first row and values of the current batch

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> pa.Array:
        with file_errors(self.path, self.kind, f"rows {start} to {stop}"):
            if not self._first <= start < self._first + len(self._batch):
                self._load(start)
            return checked_rows(self._batch.slice(start - self._first, stop - start), lambda: self.where(start))

    def where(self, row: int) -> str:
        return f"{self.path}, row {row} (from 0)"

    def _group_of(self, row: int) -> int:
        return int(np.searchsorted(self._starts, row, side="right")) - 1

    def _load(self, row: int) -> None:
        """Make the batch that contains the row the current one."""
        raise NotImplementedError


class ParquetColumn(_BatchColumn):
    """A column of a Parquet file. A row group is decoded a few rows at a time, in order; reading an earlier row starts
    it again."""

    kind = "Parquet"

    def __init__(self, path: Path, column: str | None) -> None:
        super().__init__(path)
        with file_errors(path, self.kind):
            # without buffer_size a row group's whole column would be read at once
            self._file = pq.ParquetFile(path, buffer_size=2**20)
            groups = self._file.metadata
            self._starts = _starts([groups.row_group(g).num_rows for g in range(groups.num_row_groups)])
            metadata = self._file.schema_arrow.metadata or {}
        self.name = choose_column(str(path), self._file.schema_arrow.names, column)
        names = [name for name in (LOSS_MASK, TEXT_SETTINGS) if name.encode() in metadata]
        self.stated = {name: metadata[name.encode()].decode(errors="replace") for name in names}
        """What the file's metadata state of its token ids; see `LOSS_MASK`."""
        self._group = -1
        self._batches: Iterator[pa.RecordBatch] = iter(())

    def _load(self, row: int) -> None:
        group = self._group_of(row)
        if group != self._group or row < self._first:
            self._group, self._first, self._batch = group, int(self._starts[group]), pa.nulls(0)
            count = self._rows_at_once(group)
            self._batches = self._file.iter_batches(count, row_groups=[group], columns=[self.name])
        while row >= self._first + len(self._batch):
            self._first += len(self._batch)
            batch = next(self._batches, None)
            if batch is None:
                raise pa.ArrowInvalid(f"row group {group} ends before row {row}")
            self._batch = batch.column(0)

    def _rows_at_once(self, group: int) -> int:
        """Rows of a row group to decode at a time. A file of some kilobytes may hold gigabytes: its values are encoded
        as numbers in a dictionary, and as lengths of runs."""
        # a row first: the metadata of a damaged file would end the process, while a reader raises an error
        next(self._file.iter_batches(1, row_groups=[group], columns=[self.name]), None)
        schema, metadata = self._file.schema, self._file.metadata.row_group(group)
        ours = [c for c in range(len(schema)) if schema.column(c).path.split(".")[0] == self.name]
        leaves = [metadata.column(c) for c in ours]
        values = max((leaf.num_values for leaf in leaves), default=0) / max(1, metadata.num_rows)  # of a row
        size = sum(max(leaf.total_uncompressed_size, 8 * leaf.num_values) for leaf in leaves)
        count = READ_BYTES * metadata.num_rows // max(1, size)
        texts = [x.path_in_schema for x in leaves if x.physical_type == "BYTE_ARRAY" and x.has_dictionary_page]
        if texts:
            encoded = pq.ParquetFile(self.path, buffer_size=2**20, read_dictionary=texts)
            batch = next(encoded.iter_batches(1, row_groups=[group], columns=[self.name]), None)
            longest = 0 if batch is None else _longest_in_dictionaries(batch.column(0))
            count = min(count, 2 * READ_BYTES // max(1, int(longest * values)))
        return int(min(2**14, max(1, count)))


def _longest_in_dictionaries(values: pa.Array) -> int:
    """Bytes of the longest text in the dictionaries of an array, however deep these are in it."""
    if pa.types.is_dictionary(values.type):
        return int(pc.max(pc.binary_length(values.dictionary)).as_py() or 0)
    if pa.types.is_struct(values.type):
        return max(map(_longest_in_dictionaries, values.flatten()), default=0)
    return _longest_in_dictionaries(values.values) if hasattr(values, "values") else 0


class ArrowColumn(_BatchColumn):
    """A column of a memory-mapped Arrow file or stream (Feather, the cache files of Hugging Face datasets).

    Of a compressed file one record batch is decoded at a time; a compressed stream is decoded whole.
    """

    kind = "Arrow"

    def __init__(self, path: Path, column: str | None) -> None:
        super().__init__(path)
        with file_errors(path, self.kind):
            source = pa.memory_map(str(path))
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            opened = pa.ipc.open_file if is_file else pa.ipc.open_stream
            names = opened(source).schema.names
            self.name = choose_column(str(path), names, column)
            source.seek(0)
            reader: Any = opened(source, options=pa.ipc.IpcReadOptions(included_fields=[names.index(self.name)]))
            batches = None if is_file else list(reader)
            self._get = reader.get_batch if batches is None else batches.__getitem__
            count = reader.num_record_batches if batches is None else len(batches)
            self._starts = _starts([self._get(b).num_rows for b in range(count)])

    def _load(self, row: int) -> None:
        number = self._group_of(row)
        self._first, self._batch = int(self._starts[number]), self._get(number).column(0)


def _starts(rows: list[int]) -> NDArray[np.int64]:
    """First row of each part, and the number of rows."""
    if min(rows, default=0) < 0 or sum(rows) >= 2**31:
        raise ValueError(f"got {sum(rows)} rows in {len(rows)} parts; expected 0 to 2^31")
    return np.cumsum([0, *rows], dtype=np.int64)


def checked_rows(values: pa.Array, where: Callable[[], str]) -> pa.Array:
    """The first rows of an array: as many as take a few megabytes as Python values, at least one. DataError, naming
    where they are, for an array with, say, offsets that point outside: Arrow would follow them."""
    try:
        rows = values[: 2**14]
        rows.validate()
        rows = rows[: max(1, _count(rows))]
        rows.validate(full=True)
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{where()}: this row or one of the {len(rows) - 1} after it is damaged ({error}). Fetch the file again."
        ) from error
    return rows


def _count(rows: pa.Array) -> int:
    """How many of the rows take a few megabytes as Python values."""
    kind = rows.type
    if pa.types.is_dictionary(kind) and len(kind_sizes := _sizes(rows.dictionary)):
        sizes = kind_sizes[rows.indices.fill_null(0).to_numpy()]
    else:
        sizes = _sizes(rows)
    return int(np.searchsorted(np.cumsum(sizes), READ_BYTES, side="right"))


def _sizes(values: pa.Array) -> NDArray[np.int64]:
    """Approximate bytes of each value: of texts and lists of numbers by their lengths; of anything else an even share
    of what they are encoded to, at least 64 kB, as texts in it may be repeated."""
    kind = values.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        lengths, each = pc.binary_length(values), 1
    elif (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_primitive(kind.value_type):
        lengths, each = pc.list_value_length(values), 8
    else:
        return np.full(len(values), max(2**16, values.nbytes // max(1, len(values))))
    found: NDArray[np.int64] = lengths.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64) * each
    return found


def choose_column(where: str, names: Sequence[str], column: str | None) -> str:
    """The column of that name; without a name, the only column, the only one in DEFAULT_COLUMNS, or CONVERSATIONS. Else
    UnclearColumn, or DataError for a name that no column has."""
    listed = ", ".join(map(repr, names)) or "no columns"
    if column is not None:
        if column not in names:
            raise DataError(f"{where}: there is no column {column!r}. It has {listed}.")
        return column
    usual = [name for name in names if name in DEFAULT_COLUMNS]
    for candidates in (names, usual, [] if usual else [name for name in names if name == CONVERSATIONS]):
        if len(candidates) == 1:
            return candidates[0]
    raise UnclearColumn(
        f"{where}: which column holds the documents? It has {listed}. Name one with column= (--column).", names
    )


def concat_arrays(parts: Sequence[pa.Array]) -> pa.Array:
    """Arrow arrays as one; of none, an empty one."""
    if not parts:
        return pa.nulls(0)
    return parts[0] if len(parts) == 1 else pa.concat_arrays(parts)


@contextmanager
def file_errors(path: Path, kind: str, part: str = "") -> Iterator[None]:
    """Raise whatever a library raises about a damaged file as a DataError that names the file, and the part of it."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file.") from error
    except Exception as error:
        raise DataError(
            f"{path}: {part + ': ' if part else ''}cannot be read as {kind} ({' '.join(str(error).split())}). It may "
            "be truncated or of another format: fetch it again, or leave it out."
        ) from error
