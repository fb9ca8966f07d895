"""Small files that hold gigabytes are read some megabytes at a time: by the size of what is decoded."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastkd.data.documents import Documents, open_documents

# 100 kB, 8,192 times: 0.9 GB as text; in the file a number each
LONG = "lorem ipsum dolor " * 6000
ROWS = 2**13
LIMIT = 500 << 20  # bytes beyond what an interpreter with all modules takes

READER = """
import resource, sys
sys.path.insert(0, {here!r})
from test_bounded_reading import OPENED
with open("/proc/self/statm") as file:
    pages = int(file.read().split()[0])
limit = pages * resource.getpagesize() + {limit}
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
documents = OPENED[sys.argv[2]](sys.argv[1])
lengths = documents.lengths()
print(len(lengths), int(lengths.sum(dtype="int64")), documents.read([5, len(lengths) - 1]).lengths.tolist())
"""


def repeated(values: pa.Array, rows: int = ROWS) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), values)


def write(path: Path, column: pa.Array, **options: Any) -> Path:
    """As other writers do, without Arrow's schema: it would be read as a dictionary."""
    pq.write_table(pa.table({"text": column}), path, store_schema=False, compression="zstd", **options)
    assert path.stat().st_size < 30_000
    return path


def texts(path: Path) -> Path:
    return write(path, repeated(pa.array([LONG])))


def texts_after_short_ones(path: Path) -> Path:
    indices = np.zeros(2 * ROWS, np.int32)
    indices[ROWS:] = 1
    return write(path, pa.DictionaryArray.from_arrays(pa.array(indices), pa.array(["short", LONG])))


def texts_as_a_dictionary(path: Path) -> Path:
    pq.write_table(pa.table({"text": repeated(pa.array([LONG]))}), path)
    return path


def ids(path: Path) -> Path:
    """200 million ids, a million each."""
    values = np.full(10_000_000, 7, np.int32)
    lists = pa.ListArray.from_arrays(pa.array(np.arange(0, len(values) + 1, 10**6, dtype=np.int32)), pa.array(values))
    with pq.ParquetWriter(path, pa.schema([("text", lists.type)]), store_schema=False, compression="zstd") as writer:
        for _ in range(20):
            writer.write_batch(pa.record_batch({"text": lists}), row_group_size=2**30)
    assert path.stat().st_size < 300_000
    return path


def chats(path: Path) -> Path:
    messages = pa.StructArray.from_arrays(
        [repeated(pa.array(["user"])), repeated(pa.array([LONG]))], ["role", "content"]
    )
    return write(path, pa.ListArray.from_arrays(pa.array(np.arange(0, ROWS + 1, 4, dtype=np.int32)), messages))


def of_text(path: str) -> Documents:
    return open_documents(path, tokenizer=lambda text: [len(text)] * 3, tokenizer_fingerprint="3")


def of_chats(path: str) -> Documents:
    return open_documents(
        path,
        tokenizer=lambda text: [len(text)] * 3,
        tokenizer_fingerprint="3",
        template=lambda chat, ask: "".join(message["content"] for message in chat),
        template_fingerprint="contents",
    )


OPENED: dict[str, Callable[[str], Documents]] = {"text": of_text, "ids": open_documents, "chats": of_chats}


@pytest.mark.parametrize(
    ("make", "kind", "rows", "each"),
    [
        (texts, "text", ROWS, 3),
        (texts_after_short_ones, "text", 2 * ROWS, 3),
        (texts_as_a_dictionary, "text", ROWS, 3),
        (ids, "ids", 200, 10**6),
        (chats, "chats", ROWS // 4, 3),
    ],
)
def test_a_small_file_that_holds_gigabytes(
    make: Callable[[Path], Path], kind: str, rows: int, each: int, tmp_path: Path
) -> None:
    path = make(tmp_path / "it.parquet")
    code = READER.format(here=str(Path(__file__).parent), limit=LIMIT)
    done = subprocess.run([sys.executable, "-c", code, str(path), kind], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{rows} {rows * each} [{each}, {each}]\n"
