"""Documents in text files: JSON objects, CSV records, or plain text, split by line, by paragraph or not at all.

Of a file, only the byte offset of each document is kept. Files may be compressed (byte_files.py).
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .byte_files import ByteFile, byte_file
from .columns import READ_BYTES, file_errors

Offsets = NDArray[np.int64]


class LinesColumn:
    """Rows of a text file, by their byte offsets."""

    name = ""

    def __init__(self, path: Path, find_offsets: Callable[[ByteFile], Offsets]) -> None:
        self.path = path
        with file_errors(path, "text"):
            self._file = byte_file(path)
            self._offsets = find_offsets(self._file)  # of each row, and the end of the last: [rows + 1]
        self._parsed: list[Any] | None = None  # the first row and the rows read last, which columns of the file share

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def beside(self, name: str) -> Self:
        """Another column of the same rows. Read after one another, each row is parsed once for all of them."""
        self._parsed = self._parsed or [0, ()]
        other = copy.copy(self)
        other.name = name
        return other

    def where(self, row: int) -> str:
        return f"{self.path}, line {row + 1}"

    def _rows(self, start: int, stop: int) -> Sequence[Any]:
        """The rows from start on, up to stop, parsed: as many as take a few megabytes, at least one."""
        if self._parsed is None:
            return self._parse(start, stop)
        first, rows = self._parsed
        if first != start or len(rows) < stop - start:
            self._parsed[:] = start, (rows := self._parse(start, stop))
        found: Sequence[Any] = rows[: stop - start]
        return found

    def _parse(self, start: int, stop: int) -> Sequence[Any]:
        """The same, from the file."""
        raise NotImplementedError

    def _read_block(self, start: int, stop: int) -> tuple[bytes, Offsets]:
        """The bytes of rows from start on, up to stop, as many as take a few megabytes, at least one; and the offset of
        each in them, and the end of the last."""
        stop = min(stop, start + 2**14, max(start + 1, self._row_at(int(self._offsets[start]) + READ_BYTES)))
        ends = self._offsets[start : stop + 1] - self._offsets[start]
        with file_errors(self.path, "text"):
            data = self._file.read(int(self._offsets[start]), int(ends[-1]))
        if len(data) < ends[-1]:
            raise DataError(f"{self.path}: the file became shorter after it was opened. Do not change it during a run.")
        return data, ends

    def _read_bytes(self, start: int, stop: int) -> list[bytes]:
        """The same rows one by one, without the line ends after them."""
        data, ends = self._read_block(start, stop)
        return [data[a:b].rstrip(b"\r\n") for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]

    def _row_at(self, offset: int) -> int:
        return int(np.searchsorted(self._offsets, offset, side="right")) - 1

    def _decode(self, row: int, data: bytes) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{self.where(row)}: not UTF-8 ({error}). Convert the file, or fix the line.") from error


class TextColumn(LinesColumn):
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


def lines_of(file: ByteFile) -> Iterator[bytes]:
    """The lines of a file, each with its line end."""
    pending: list[bytes] = []  # the start of a line that continues in the next block
    for block in file.blocks():
        *whole, rest = block.split(b"\n")
        for line in whole:
            yield b"".join([*pending, line, b"\n"])
            pending.clear()
        if rest:
            pending.append(rest)
    if pending:
        yield b"".join(pending)


def line_offsets(file: ByteFile) -> Offsets:
    """Byte offset of each line, and the size of the file: `[lines + 1]`."""
    parts, size = [np.zeros(1, np.int64)], 0
    for block in file.blocks():
        parts.append(np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + (size + 1))
        size += len(block)
    offsets = np.concatenate(parts)
    return offsets if offsets[-1] == size else np.append(offsets, size)


def _paragraph_offsets(file: ByteFile) -> Offsets:
    """Byte offset of each run of lines that are not blank, and the end of the last: `[paragraphs + 1]`."""
    offsets, size, end, inside = [], 0, 0, False
    for line in lines_of(file):
        blank = line.isspace()
        if not (blank or inside):
            offsets.append(size)
        inside = not blank
        size += len(line)
        end = end if blank else size
    return np.array([*offsets, end], np.int64)


_OFFSETS: dict[str, Callable[[ByteFile], Offsets]] = {
    "line": line_offsets,
    "blank-line": _paragraph_offsets,
    "file": lambda file: np.array([0, file.size()], np.int64),
}
TEXT_DOCUMENTS = tuple(_OFFSETS)  # what a document of a text file can be
