"""Documents in files of lines: JSON objects, one a line; or plain text, cut where a setting says.

What is kept of a file is 8 bytes a document: where it begins.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .columns import READ_BYTES, choose_column, naming

TEXT_DOCUMENTS = ("line", "blank-line", "file")  # what can make up a document of a text file


class JsonLinesColumn:
    """A file of JSON objects, one a line."""

    def __init__(self, path: Path, column: str | None) -> None:
        self.path = path
        with naming(path, "text"):
            self._begins = _line_begins(path)
        self.row_bytes = int(self._begins[-1]) / max(1, len(self))
        self.name = ""
        if len(self):
            first = self._parsed(0, _slices(path, self._begins, 0, 1)[0])
            self.name = choose_column(str(path), list(first), column)

    def __len__(self) -> int:
        return len(self._begins) - 1

    def read(self, start: int, stop: int) -> list[Any]:
        lines = _slices(self.path, self._begins, start, stop)
        return [self._value(row, self._parsed(row, line)) for row, line in enumerate(lines, start)]

    def where(self, row: int) -> str:
        return f"{self.path}, line {row + 1}"

    def _parsed(self, row: int, line: bytes) -> dict[str, Any]:
        try:
            value = json.loads(_decoded(line, self.where(row)))
        except (ValueError, RecursionError) as error:
            found = f"not JSON ({error})" if line.strip() else "an empty line"
            raise DataError(f"{self.where(row)}: got {found}; expected one JSON object a line.") from error
        if not isinstance(value, dict):
            raise DataError(f"{self.where(row)}: got {type(value).__name__}; expected one JSON object a line.")
        return value

    def _value(self, row: int, value: dict[str, Any]) -> Any:
        if self.name not in value:
            raise DataError(
                f"{self.where(row)}: there is no {self.name!r} in it; it has {', '.join(map(repr, value))}."
            )
        return value[self.name]


class TextColumn:
    """A file of plain text. documents: what makes one up: a "line"; lines up to a "blank-line"; or the whole "file"."""

    name = ""

    def __init__(self, path: Path, column: str | None, documents: str) -> None:
        self.path, self.documents = path, documents
        with naming(path, "text"):
            self._begins = _BEGINS[documents](path)
        self.row_bytes = int(self._begins[-1]) / max(1, len(self))
        if column is not None:
            raise DataError(f"{path}: plain text has no columns; found column={column!r}. Leave it out.")

    def __len__(self) -> int:
        return len(self._begins) - 1

    def read(self, start: int, stop: int) -> list[Any]:
        parts = _slices(self.path, self._begins, start, stop)
        if self.documents == "blank-line":
            parts = [part.rstrip() for part in parts]  # the blank lines may hold spaces
        return [_decoded(part, self.where(row)) for row, part in enumerate(parts, start)]

    def where(self, row: int) -> str:
        place = {"line": f", line {row + 1}", "blank-line": f", paragraph {row + 1}", "file": ""}
        return f"{self.path}{place[self.documents]}"


def _slices(path: Path, begins: NDArray[np.int64], start: int, stop: int) -> list[bytes]:
    """Documents start to stop, without the ends of lines behind them."""
    ends = begins[start : stop + 1] - begins[start]
    with naming(path, "text"), open(path, "rb") as file:
        file.seek(int(begins[start]))
        data = file.read(int(ends[-1]))
    if len(data) < ends[-1]:
        raise DataError(f"{path}: the file is shorter than when it was opened. Start again with a file at rest.")
    return [data[a:b].rstrip(b"\r\n") for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error}). Convert the file, or mend the line.") from error


def _line_begins(path: Path) -> NDArray[np.int64]:
    """Where each line begins, and the end of the file: `[lines + 1]`, in bytes."""
    parts, size = [np.zeros(1, np.int64)], 0
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            parts.append(np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + (size + 1))
            size += len(block)
    begins = np.concatenate(parts)
    return begins if begins[-1] == size else np.append(begins, size)


def _paragraph_begins(path: Path) -> NDArray[np.int64]:
    """Where each run of lines that are not blank begins, and where the last one ends."""
    begins, size, end, within = [], 0, 0, False
    with open(path, "rb") as file:
        for line in file:
            blank = line.isspace()
            if not (blank or within):
                begins.append(size)
            within = not blank
            size += len(line)
            end = end if blank else size
    return np.array([*begins, end], np.int64)


def _whole(path: Path) -> NDArray[np.int64]:
    return np.array([0, path.stat().st_size], np.int64)


_BEGINS = dict(zip(TEXT_DOCUMENTS, (_line_begins, _paragraph_begins, _whole), strict=True))
