"""From a source (files, a Hugging Face Dataset, or values in memory) to its columns."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..errors import DataError
from .columns import LOSS_MASK, ArrowColumn, Column, ParquetColumn, Values, checked_rows, choose_column, concat_arrays
from .lines import TEXT_DOCUMENTS, JsonLinesColumn, TextColumn

_FORMATS: dict[str, Callable[[Path, str | None, str], Column]] = {
    **dict.fromkeys((".parquet", ".pq"), lambda path, column, _: ParquetColumn(path, column)),
    **dict.fromkeys((".arrow", ".feather", ".ipc"), lambda path, column, _: ArrowColumn(path, column)),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), lambda path, column, _: JsonLinesColumn(path, column)),
    **dict.fromkeys((".txt", ".text"), TextColumn),
}
_URL = re.compile(r"(\w{2,}):/+(?!$)")
_ROWS = 1024  # of values in memory at a time


@dataclass(frozen=True, eq=False)
class Source:
    """An opened source: its columns, one after the other, and its files (none for a Dataset or values in memory)."""

    columns: list[Column]
    files: list[Path]

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
            if isinstance(part, pa.ChunkedArray):
                part.validate(full=True)
                part = concat_arrays(part.chunks)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.where(start)} or after it: cannot be read ({error}).") from error
        return checked_rows(part, lambda: self.where(start)) if isinstance(part, pa.Array) else list(part)

    def where(self, row: int) -> str:
        return f"{self._what} {row} (from 0)"


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
    names = [source] if isinstance(source, (str, Path)) else source
    if isinstance(source, (str, Path)) or (_is_list(source) and all(isinstance(name, Path) for name in source)):
        paths = [path for name in names for path in _expand(name)]
        if odd := [path for path in paths if path.exists() and not path.is_file()]:
            raise DataError(
                f"{odd[0]}: got a pipe or a device; expected a regular file, of which rows are read by number."
            )
        if unknown := [path for path in paths if path.suffix.lower() not in _FORMATS]:
            raise DataError(f"{unknown[0]}: got an unknown suffix; expected one of {', '.join(_FORMATS)}.")
        return Source([_FORMATS[path.suffix.lower()](path, column, text_documents) for path in paths], paths)
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
        return Source([RowsColumn(rows, source.column_names, column, "the Dataset", "row")], [])
    if hasattr(source, "__len__") and hasattr(source, "__getitem__") and not isinstance(source, (dict, bytes)):
        names = source.schema.names if isinstance(source, (pa.Table, pa.RecordBatch)) else None
        return Source([RowsColumn(source, names, column, "the data in memory", "document")], [])
    raise DataError(
        f"source: got {type(source).__name__}; expected a file, a folder, a pattern, a list of Paths, a Dataset, or a "
        "sequence of documents."
    )


def _is_list(source: Any) -> bool:
    return isinstance(source, (list, tuple)) and bool(source)


def _is_file(text: str) -> bool:
    return len(text) < 1000 and Path(text).suffix.lower() in _FORMATS and "\0" not in text and Path(text).is_file()


def _expand(name: str | Path) -> list[Path]:
    """A file itself; of a folder, the files with a known suffix; of a pattern, its matches; both sorted by name."""
    path = Path(name)
    if _URL.match(str(name)):
        whole = _URL.sub(r"\1://", str(name))  # Path makes one slash of two
        raise DataError(f"{whole}: got a URL; expected a file, a folder or a pattern. Download the data first.")
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in _FORMATS)
    elif path.exists() or not any(mark in str(name) for mark in "*?["):
        return [path]
    else:
        found = sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor) if path.anchor else path)))
    if not found:
        raise DataError(f"{name}: there are no files of {', '.join(_FORMATS)}.")
    return found
