"""Text that every Python installation has, and windows of its tokens."""

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


def language_reference() -> Iterator[str]:
    """CPython's language reference as one text, each paragraph once.

    A fifth of its paragraphs are repetitions: without this, held-out windows would also be trained on.
    """
    from pydoc_data.topics import topics

    paragraphs = (p for topic in topics.values() for p in topic.split("\n\n"))
    yield "\n\n".join({" ".join(p.split()): p.strip("\n") for p in paragraphs if p.strip()}.values())


def package_sources(seed: int, folder: Path | None = None) -> Iterator[str]:
    """The distinct source files below a folder (None: site-packages), in a random order; only those in UTF-8."""
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


def token_windows(texts: Iterable[str], tokenizer: Tokenizer, *, length: int, count: int, seed: int) -> Array:
    """Windows `[count, length]` of the tokens of the concatenated texts, in their order.

    Only as many texts are read as needed; of surplus windows of the last text, the seed selects. Raises DataError if
    there are too few tokens.
    """
    tokens: list[int] = []
    for text in texts:
        tokens += tokenizer.encode(text)
        if len(tokens) >= count * length:
            break
    available = len(tokens) // length
    if not 1 <= count <= available:
        wanted = f"windows: got {count} of {length} tokens; expected 1 to {available}, the length of the text"
        raise DataError(f"{wanted}. Use fewer or shorter windows.")
    chosen = np.sort(np.random.default_rng(seed).permutation(available)[:count])
    return np.array(tokens[: available * length], np.int32).reshape(-1, length)[chosen]


def save_windows(path: Path, windows: Array) -> None:
    """Write the windows as the rows of a Parquet file for `fastkd capture --data`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"input_ids": pa.array(windows.tolist(), pa.list_(pa.int32()))})
    write_file(path, lambda temporary: pq.write_table(table, temporary))
