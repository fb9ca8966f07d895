"""Rows of a JSON file: an object per line (JSON lines), or one array of objects."""

import codecs
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from ..cache.errors import type_name
from ..errors import DataError
from .byte_files import ByteFile
from .columns import choose_column
from .lines import LinesColumn, Offsets, line_offsets

_LARGEST = 2**26  # characters of an element of an array
_SPACE = re.compile(r"[ \t\r\n]*")


class JsonColumn(LinesColumn):
    """A key of the JSON objects in a file."""

    def __init__(self, path: Path, column: str | None) -> None:
        self._array, self._may_lack = False, False
        super().__init__(path, self._find)
        if len(self):
            self.name = choose_column(str(path), self.names(), column)

    def _find(self, file: ByteFile) -> Offsets:
        first = next((text for block in file.blocks() if (text := block.lstrip())), b"")
        self._array = first.startswith(b"[")
        return array_offsets(file, str(self.path)) if self._array else line_offsets(file)

    def names(self) -> list[str]:
        """The keys of the first object; none without one."""
        return list(self._object(0, self._read_bytes(0, 1)[0])) if len(self) else []

    def optional(self, name: str) -> "JsonColumn":
        """Another key of the same objects, None where they lack it."""
        other = self.beside(name)
        other._may_lack = True
        return other

    def where(self, row: int) -> str:
        return f"{self.path}, element {row} (from 0)" if self._array else super().where(row)

    def read(self, start: int, stop: int) -> list[Any]:
        values = []
        for row, value in enumerate(self._rows(start, stop), start):
            if self.name not in value and not self._may_lack:
                keys = ", ".join(map(repr, value)) or "none"
                raise DataError(f"{self.where(row)}: got an object with keys {keys}; expected {self.name!r}.")
            values.append(value.get(self.name))
        return values

    def _parse(self, start: int, stop: int) -> list[dict[str, Any]]:
        return [self._object(row, line) for row, line in enumerate(self._read_bytes(start, stop), start)]

    def _object(self, row: int, line: bytes) -> dict[str, Any]:
        if self._array:
            line = line.rstrip(b", \t\r\n")  # what separates it from the next
        try:
            value = json.loads(self._decode(row, line))
        except (ValueError, RecursionError) as error:
            got = f"invalid JSON ({error})" if line.strip() else "an empty line"
            raise DataError(f"{self.where(row)}: got {got}; expected a JSON object.") from error
        if not isinstance(value, dict):
            raise DataError(f"{self.where(row)}: got {type_name(value)}; expected a JSON object.")
        return value


def array_offsets(file: ByteFile, name: str) -> Offsets:
    """Byte offset of each element of a JSON array of objects, and the end of the last: `[elements + 1]`. Reads the file
    once, some megabytes at a time. DataError for anything else, naming the element."""
    decode, blocks = codecs.getincrementaldecoder("utf-8")().decode, file.blocks()
    parse = json.JSONDecoder().raw_decode
    offsets: list[int] = []
    text, at = "", 0  # what is read, and where in it
    done = end = 0  # that place in bytes of the file, and the end of the last element
    expected = "["

    def fill() -> bool:
        """Read on; whether there was more."""
        nonlocal text, at
        block = next(blocks, None)
        if block is not None:
            text, at = text[at:] + decode(block), 0
        return block is not None

    def failed(got: str) -> DataError:
        return DataError(f"{name}, element {len(offsets)} (from 0): got {got}; expected an array of JSON objects.")

    while True:
        space = _SPACE.match(text, at)
        assert space is not None
        done, at = done + space.end() - at, space.end()
        if at == len(text):
            if not fill():
                if not expected:
                    return np.array([*offsets, end], np.int64)
                raise failed("the end of the file")
        elif not expected:
            raise DataError(
                f"{name}: got {text[at : at + 20]!r} after the end of the array; expected one array of JSON objects, "
                "and nothing after it."
            )
        elif text[at] == "]" and expected in (",", "{]"):
            done, at, expected = done + 1, at + 1, ""
        elif text[at] == "{" and expected[0] == "{":
            try:
                _, stop = parse(text, at)
            except (ValueError, RecursionError) as error:
                if isinstance(error, RecursionError) or len(text) - at > _LARGEST or not fill():
                    raise failed(f"invalid JSON ({error})") from error
                continue
            offsets.append(done)
            end = done + len(text[at:stop].encode())
            done, at, expected = end, stop, ","
        elif text[at] == expected[0]:
            done, at, expected = done + 1, at + 1, "{]" if expected == "[" else "{"
        else:
            raise failed(repr(text[at : at + 20]))
