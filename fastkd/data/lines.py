"""Documents in text files: JSON objects, one a line, or plain text, split by line, by paragraph or not at all.

Of a file, only the byte offset of each document is kept.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .columns import READ_BYTES, choose_column, file_errors

Offsets = NDArray[np.int64]


class _LinesColumn:
    """Rows of a text file, by their byte offsets."""

    name = ""

    def __init__(self, path: Path, find_offsets: Callable[[Path], Offsets]) -> None:
        self.path = path
        with file_errors(path, "text"):
            self._offsets = find_offsets(path)  # of each row, and the end of the last: [rows + 1]

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def where(self, row: int) -> str:
        return f"{self.path}, line {row + 1}"

    def _read_bytes(self, start: int, stop: int) -> list[bytes]:
        """Rows from start on, up to stop, without the line ends after them: a few megabytes, at least one row."""
        stop = min(stop, start + 2**14, max(start + 1, self._row_at(int(self._offsets[start]) + READ_BYTES)))
        ends = self._offsets[start : stop + 1] - self._offsets[start]
        with file_errors(self.path, "text"), open(self.path, "rb") as file:
            file.seek(int(self._offsets[start]))
            data = file.read(int(ends[-1]))
        if len(data) < ends[-1]:
            raise DataError(f"{self.path}: the file became shorter after it was opened. Do not change it during a run.")
        return [data[a:b].rstrip(b"\r\n") for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]

    def _row_at(self, offset: int) -> int:
        return int(np.searchsorted(self._offsets, offset, side="right")) - 1

    def _decode(self, row: int, data: bytes) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{self.where(row)}: not UTF-8 ({error}). Convert the file, or fix the line.") from error


class JsonLinesColumn(_LinesColumn):
    """A key of the JSON objects in a file, one a line."""

    def __init__(self, path: Path, column: str | None) -> None:
        super().__init__(path, _line_offsets)
        if len(self):
            self.name = choose_column(str(path), list(self._object(0, self._read_bytes(0, 1)[0])), column)

    def read(self, start: int, stop: int) -> list[Any]:
        values = []
        for row, line in enumerate(self._read_bytes(start, stop), start):
            value = self._object(row, line)
            if self.name not in value:
                keys = ", ".join(map(repr, value)) or "none"
                raise DataError(f"{self.where(row)}: got an object with keys {keys}; expected {self.name!r}.")
            values.append(value[self.name])
        return values

    def _object(self, row: int, line: bytes) -> dict[str, Any]:
        try:
            value = json.loads(self._decode(row, line))
        except (ValueError, RecursionError) as error:
            got = f"invalid JSON ({error})" if line.strip() else "an empty line"
            raise DataError(f"{self.where(row)}: got {got}; expected a JSON object.") from error
        if not isinstance(value, dict):
            raise DataError(f"{self.where(row)}: got {type(value).__name__}; expected a JSON object.")
        return value


class TextColumn(_LinesColumn):
    """A file of plain text. documents: what a document is: a "line", a paragraph ("blank-line": blank lines separate
    them), or the "file"."""

    def __init__(self, path: Path, column: str | None, documents: str) -> None:
        if column is not None:
            raise DataError(f"column: got {column!r}, but {path} is plain text, which has no columns. Leave it out.")
        super().__init__(path, _OFFSETS[documents])
        self.documents = documents

    def read(self, start: int, stop: int) -> list[Any]:
        parts = self._read_bytes(start, stop)
        if self.documents == "blank-line":
            parts = [part.rstrip() for part in parts]  # blank lines may contain spaces
        return [self._decode(row, part) for row, part in enumerate(parts, start)]

    def where(self, row: int) -> str:
        part = {"line": f", line {row + 1}", "blank-line": f", paragraph {row + 1}", "file": ""}
        return f"{self.path}{part[self.documents]}"


def _line_offsets(path: Path) -> Offsets:
    """Byte offset of each line, and the size of the file: `[lines + 1]`."""
    parts, size = [np.zeros(1, np.int64)], 0
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            parts.append(np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + (size + 1))
            size += len(block)
    offsets = np.concatenate(parts)
    return offsets if offsets[-1] == size else np.append(offsets, size)


def _paragraph_offsets(path: Path) -> Offsets:
    """Byte offset of each run of lines that are not blank, and the end of the last: `[paragraphs + 1]`."""
    offsets, size, end, inside = [], 0, 0, False
    with open(path, "rb") as file:
        for line in file:
            blank = line.isspace()
            if not (blank or inside):
                offsets.append(size)
            inside = not blank
            size += len(line)
            end = end if blank else size
    return np.array([*offsets, end], np.int64)


_OFFSETS: dict[str, Callable[[Path], Offsets]] = {
    "line": _line_offsets,
    "blank-line": _paragraph_offsets,
    "file": lambda path: np.array([0, path.stat().st_size], np.int64),
}
TEXT_DOCUMENTS = tuple(_OFFSETS)  # what a document of a text file can be
