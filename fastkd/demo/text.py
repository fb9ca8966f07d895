"""Real text that is there wherever Python is, and windows of its tokens."""

import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..errors import DataError
from ..models.tokenizers import Tokenizer
from ..utils.atomic import write_file

Array = NDArray[Any]
COLUMN = "input_ids"


def language_reference() -> Iterator[str]:
    """CPython's language reference, which every CPython carries, as one text; of its paragraphs that stand in several
    topics, one.

    A fifth of it is repetition: held-out windows would otherwise have been trained on.
    """
    from pydoc_data.topics import topics

    paragraphs = (p for topic in topics.values() for p in topic.split("\n\n"))
    yield "\n\n".join({" ".join(p.split()): p.strip("\n") for p in paragraphs if p.strip()}.values())


def package_sources(seed: int, folder: Path | None = None) -> Iterator[str]:
    """The source files of this Python's packages, a text each, in an order of the seed's; each text once.

    folder: where they lie; None: site-packages. What is not UTF-8 is no text, and left out.
    """
    folder = folder or Path(sysconfig.get_path("purelib"))
    files = sorted(folder.rglob("*.py"))
    seen: set[str] = set()
    for number in np.random.default_rng(seed).permutation(len(files)):
        try:
            text = files[number].read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip() and text not in seen:
            seen.add(text)
            yield text


def windows_of(texts: Iterable[str], tokenizer: Tokenizer, *, length: int, wanted: int, seed: int) -> Array:
    """So many windows `[wanted, length]` of the tokens of texts, one after another, in their order.

    Of texts as many are read as it takes; where the last of them gives more windows, the seed chooses. DataError where
    there are fewer.
    """
    tokens: list[int] = []
    for text in texts:
        tokens += tokenizer.encode(text)
        if len(tokens) >= wanted * length:
            break
    count = len(tokens) // length
    if not 1 <= wanted <= count:
        raise DataError(
            f"windows: got {wanted} asked for, of {length} tokens, and a text of {count}. Ask for fewer, or for "
            "shorter ones."
        )
    chosen = np.sort(np.random.default_rng(seed).permutation(count)[:wanted])
    return np.array(tokens[: count * length], np.int32).reshape(-1, length)[chosen]


def have_windows(path: Path, windows: Array) -> None:
    """A Parquet file of these windows, a row each, as `fastkd capture --data` takes it; one that holds them is left."""
    if path.exists() and np.array_equal(windows_in(path), windows):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({COLUMN: pa.array(windows.tolist(), pa.list_(pa.int32()))})
    write_file(path, lambda part: pq.write_table(table, part))


def windows_in(path: Path) -> Array:
    """The windows `[n, L]` of such a file; of a damaged one none."""
    try:
        rows = pq.read_table(path, columns=[COLUMN]).column(COLUMN).to_pylist()
    except (pa.ArrowException, KeyError):  # it will be written anew
        rows = []
    return np.array(rows, np.int32)
