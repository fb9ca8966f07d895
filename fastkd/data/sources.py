"""Which columns a source has: files, a Hugging Face Dataset, or what is in memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..errors import DataError
from .columns import (
    ArrowColumn,
    Column,
    ParquetColumn,
    Values,
    choose_column,
    joined,
)
from .lines import TEXT_DOCUMENTS, JsonLinesColumn, TextColumn

_SUFFIXES = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "lines",
    ".txt": "text",
    ".text": "text",
}


class MemoryColumn:
    """Values that are in memory already: a sequence, a NumPy array of rows, an Arrow array or a column of a table."""

    name = ""
    row_bytes = 2.0**13

    def __init__(self, values: Any, column: str | None) -> None:
        if isinstance(values, (pa.Table, pa.RecordBatch)):
            self.name = choose_column("the table", values.schema.names, column)
            values = values.column(self.name)
        elif column is not None:
            raise DataError(f"column: got {column!r}; {type(values).__name__} in memory has no columns. Leave it out.")
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def read(self, start: int, stop: int) -> Values:
        part = self._values[start:stop]
        if isinstance(part, pa.ChunkedArray):
            return joined(part.chunks)
        return part if isinstance(part, pa.Array) else list(part)

    def where(self, row: int) -> str:
        return f"the data in memory, document {row} (from 0)"


class HuggingFaceColumn:
    """A column of a `datasets.Dataset`, through three things that one has: length, column_names, with_format."""

    row_bytes = 2.0**13

    def __init__(self, dataset: Any, column: str | None) -> None:
        self.name = choose_column("the Dataset", dataset.column_names, column)
        self._dataset = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, start: int, stop: int) -> pa.Array:
        return joined(self._dataset[start:stop].column(self.name).chunks)

    def where(self, row: int) -> str:
        return f"the Dataset, row {row} (from 0)"


@dataclass(frozen=True, eq=False)
class Opened:
    """A source that was opened before, to look at what it holds."""

    columns: list[Column]
    files: list[Path]


def open_column(source: Any, column: str | None, text_documents: str = "line") -> tuple[list[Column], list[Path]]:
    """The columns that make up a source, one after the other, and their files (none, where it is in memory).

    text_documents: what makes up a document of a text file; see `TextColumn`. DataError where it is not "line", and
    nothing is text.
    """
    if isinstance(source, Opened):
        return source.columns, source.files
    if text_documents not in TEXT_DOCUMENTS:
        raise DataError(f"text_documents: got {text_documents!r}; expected one of {', '.join(TEXT_DOCUMENTS)}.")
    columns, files = _open_column(source, column, text_documents)
    if text_documents != "line" and not any(isinstance(found, TextColumn) for found in columns):
        raise DataError(
            f"text_documents: got {text_documents!r}, and no text file to be cut: in all other data a row is a "
            "document. Leave it out."
        )
    return columns, files


def _open_column(source: Any, column: str | None, text_documents: str) -> tuple[list[Column], list[Path]]:
    if isinstance(source, (str, Path)):
        return _open_files([source], column, text_documents)
    if isinstance(source, (list, tuple)) and source and all(isinstance(s, Path) for s in source):
        return _open_files(source, column, text_documents)
    if isinstance(source, (list, tuple)) and source and isinstance(source[0], str) and _is_file(source[0]):
        # as text, the names themselves would become tokens
        raise DataError(f"source: found a list of texts of which the first, {source[0]!r}, is a file. Give Paths.")
    if hasattr(source, "with_format") and hasattr(source, "column_names"):
        if isinstance(source.column_names, dict):
            raise DataError(f"found several splits ({', '.join(source.column_names)}). Choose one: dataset[split].")
        if not hasattr(source, "__len__"):
            raise DataError("the Dataset is a stream, which has no row numbers. Load it without streaming=True.")
        return [HuggingFaceColumn(source, column)], []
    if hasattr(source, "__len__") and hasattr(source, "__getitem__") and not isinstance(source, (dict, bytes)):
        return [MemoryColumn(source, column)], []
    raise DataError(
        f"source: got {type(source).__name__}; a file, a folder or a pattern, a list of Paths, a Dataset, or "
        "a sequence of documents is needed."
    )


def _open_files(
    places: Sequence[str | Path], column: str | None, text_documents: str
) -> tuple[list[Column], list[Path]]:
    paths = [path for place in places for path in _expanded(place)]
    return [_open_file(path, column, text_documents) for path in paths], paths


def _is_file(text: str) -> bool:
    return len(text) < 1000 and Path(text).suffix.lower() in _SUFFIXES and "\0" not in text and Path(text).is_file()


def _expanded(place: str | Path) -> list[Path]:
    """A file as it is; the files of a folder that have a known suffix, or of a pattern, by name."""
    path = Path(place)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES)
    elif path.exists() or not any(mark in str(place) for mark in "*?["):
        return [path]
    else:
        found = sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor) if path.anchor else path)))
    if not found:
        raise DataError(f"{place}: there are no files of {', '.join(_SUFFIXES)}.")
    return found


def _open_file(path: Path, column: str | None, text_documents: str) -> Column:
    known = _SUFFIXES.get(path.suffix.lower())
    if known is None:
        raise DataError(f"{path}: unknown kind of file; one of {', '.join(_SUFFIXES)} is needed.")
    if known == "parquet":
        return ParquetColumn(path, column)
    if known == "arrow":
        return ArrowColumn(path, column)
    return JsonLinesColumn(path, column) if known == "lines" else TextColumn(path, column, text_documents)
