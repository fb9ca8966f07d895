"""The bytes of a text file, as they are or compressed (.gz, .zst): one pass over all of them, and any part of them.

Of a compressed file nothing is unpacked to disk or kept in memory. A part behind the last one is reached by reading on,
one before it by reading again from the start: cheap in the order of the file, not in a random one.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from .columns import READ_BYTES

COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
"""The codec of pyarrow by suffix."""


class ByteFile(Protocol):
    """The bytes of a file, decompressed."""

    def blocks(self) -> Iterator[bytes]:
        """All of them, some megabytes at a time."""

    def read(self, start: int, size: int) -> bytes:
        """`size` bytes from `start` on; fewer if the file ends before."""

    def size(self) -> int:
        """Their number. A compressed file is read for it."""


def byte_file(path: Path) -> ByteFile:
    """The bytes of a file, by its last suffix. What they raise is an OSError (of pyarrow, too)."""
    codec = COMPRESSED.get(path.suffix.lower())
    return PlainFile(path) if codec is None else CompressedFile(path, codec)


class PlainFile:
    """A file as it is."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def blocks(self) -> Iterator[bytes]:
        with open(self._path, "rb") as file:
            while block := file.read(READ_BYTES):
                yield block

    def read(self, start: int, size: int) -> bytes:
        with open(self._path, "rb") as file:
            file.seek(start)
            return file.read(size)

    def size(self) -> int:
        return self._path.stat().st_size


class CompressedFile:
    """A file that pyarrow decompresses. codec: its name there. For one thread at a time."""

    def __init__(self, path: Path, codec: str) -> None:
        self._path, self._codec = path, codec
        self._stream: Any = None
        self._at, self._process = 0, os.getpid()  # bytes read from the stream, and whose stream it is

    def _open(self) -> Any:
        return pa.CompressedInputStream(pa.OSFile(str(self._path)), self._codec)

    def blocks(self) -> Iterator[bytes]:
        if not self._path.stat().st_size:
            raise OSError("got an empty file; even of nothing, compressed data have a header")
        with self._open() as stream:
            while block := stream.read(READ_BYTES):
                yield block

    def read(self, start: int, size: int) -> bytes:
        # a forked process shares the position in the file with its parent
        if self._stream is None or start < self._at or self._process != os.getpid():
            self._stream, self._at, self._process = self._open(), 0, os.getpid()
        while self._at < start:
            skipped = len(self._stream.read(min(READ_BYTES, start - self._at)))
            if not skipped:
                return b""
            self._at += skipped
        parts = []
        while size > 0 and (part := self._stream.read(size)):
            parts.append(part)
            size -= len(part)
        data = b"".join(parts)
        self._at += len(data)
        return data

    def size(self) -> int:
        return sum(map(len, self.blocks()))
