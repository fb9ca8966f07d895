"""Rows of a CSV file (comma-separated) or a TSV file (tab-separated), with the columns' names in its first record.

A record may span lines, in quotes. Values are text.
"""

import csv
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from .byte_files import ByteFile
from .columns import choose_column
from .lines import LinesColumn, Offsets, lines_of

DELIMITERS = {".csv": ",", ".tsv": "\t"}
_IDS = ("input_ids", "tokens")
_LONGEST = 2**31 - 1  # characters of a value
_MARK = "\ufeff"  # byte order mark, as spreadsheets write it
_limit = threading.Lock()


class CsvColumn(LinesColumn):
    """A column of a CSV file."""

    def __init__(self, path: Path, column: str | None) -> None:
        suffixes = [suffix.lower() for suffix in path.suffixes]
        self._delimiter = next((DELIMITERS[s] for s in reversed(suffixes) if s in DELIMITERS), ",")
        self._header: list[str] = []
        super().__init__(path, self._find)
        if not self._header:
            raise DataError(f"{path}: got no first record; expected the names of the columns.")
        if len(self._header) == 1 and any(mark in self._header[0] for mark in set(";\t|,") - {self._delimiter}):
            raise DataError(
                f"{path}: got one column, {self._header[0]!r}; expected names with {self._delimiter!r} between them. "
                "Write the file with that separator."
            )
        self.name = choose_column(str(path), self._header, column)
        if self.name in _IDS:
            raise DataError(
                f"{path}: got the column {self.name!r} in CSV, whose values are text; expected token ids in lists, "
                "as in Parquet or JSON lines."
            )

    def names(self) -> list[str]:
        """The columns."""
        return self._header

    def where(self, row: int) -> str:
        return f"{self.path}, row {row} (from 0, after the names)"

    def read(self, start: int, stop: int) -> list[Any]:
        index = self._header.index(self.name)
        return [record[index] for record in self._rows(start, stop)]

    def _parse(self, start: int, stop: int) -> list[list[str]]:
        data, ends = self._read_block(start, stop)
        lines = (line + "\n" for line in self._decode(start, data).split("\n"))
        with _long_values():
            try:
                found = [record for record in csv.reader(lines, delimiter=self._delimiter, strict=True) if record]
            except csv.Error as error:
                raise DataError(f"{self.where(start)} or after it: got a damaged record ({error}).") from error
        if len(found) != len(ends) - 1:
            raise DataError(f"{self.path}: the file was changed after it was opened. Do not change it during a run.")
        for row, record in enumerate(found, start):
            if len(record) != len(self._header):
                raise DataError(
                    f"{self.where(row)}: got {len(record)} values; expected {len(self._header)}, as there are names "
                    f"({', '.join(map(repr, self._header))})."
                )
        return found

    def _find(self, file: ByteFile) -> Offsets:
        """Byte offset of each record after the names, and the end of the last: `[records + 1]`."""
        done, number = 0, 0

        def text() -> Iterator[str]:
            nonlocal done, number
            for line in lines_of(file):
                done, number = done + len(line), number + 1
                try:
                    yield line.decode().removeprefix(_MARK) if number == 1 else line.decode()
                except UnicodeDecodeError as error:
                    raise DataError(f"{self.path}, line {number}: not UTF-8 ({error}). Convert the file.") from error

        offsets, start, end = [], 0, 0
        with _long_values():
            try:
                for record in csv.reader(text(), delimiter=self._delimiter, strict=True):
                    if record and not self._header:
                        self._header, end = record, done
                    elif record:  # others are blank lines
                        offsets.append(start)
                        end = done
                    start = done
            except csv.Error as error:
                raise DataError(f"{self.path}, line {number}: got a damaged record ({error}).") from error
        return np.array([*offsets, end], np.int64)


@contextmanager
def _long_values() -> Iterator[None]:
    """Without the limit of 128 kB a value, which `csv` has for the whole process."""
    with _limit:
        before = csv.field_size_limit(_LONGEST)
        try:
            yield
        finally:
            csv.field_size_limit(before)
