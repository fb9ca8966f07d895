"""Documents as token ids, by number: from files, a Hugging Face Dataset, or memory; from ids, text or conversations.

docs = open_documents("corpus/*.parquet", column="input_ids", vocab_size=49152)
lengths = docs.lengths(progress=True)  # one streaming pass, in which every value is checked
some = docs.read([3, 4, 10])  # tokens, lengths, loss_mask
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tqdm import tqdm

from ..errors import DataError
from ..utils.hashing import files_sha256
from .chat import NotChat, Template, Tokenizer, chat_tokens
from .columns import Column, Values, rows_at_a_time
from .lines import TextColumn
from .sources import open_column

LARGEST_ID = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Tokens:
    """Documents one after the other: n tokens of d documents.

    tokens: int32 `[n]`. lengths: int64 `[d]`, 0 where a document is empty. loss_mask: bool `[n]`, whether the teacher's
    distribution after that token counts.
    """

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]


def open_documents(
    source: Any,
    *,
    column: str | None = None,
    text_documents: str = "line",
    tokenizer: Tokenizer | None = None,
    tokenizer_fingerprint: str = "",
    template: Template | None = None,
    template_fingerprint: str = "",
    loss_on: str = "all",
    vocab_size: int | None = None,
) -> "Documents":
    """The documents of a source; only its metadata is read (of files of lines, where the lines begin).

    source: a file, a folder, a pattern, or a list of `Path`s; Parquet, Arrow (file or stream), JSON lines, or plain
        text, told apart by their suffixes. Or a Hugging Face `Dataset`. Or in memory: a sequence of documents, a 2-d
        array, an Arrow table or array. Rows are numbered from 0, through all files.
    column: which one; not needed where there is one, or one of `input_ids`, `tokens`, `text`, `messages`.
    text_documents: of text files, what makes up a document: a "line", lines up to a "blank-line", or a "file".
    tokenizer: text to ids (an end-of-document token is its business), with tokenizer_fingerprint, which says which one
        it is. Without a tokenizer the column holds ids, which are taken as they are.
    template: the column holds messages; this makes text of them (see chat.py), with template_fingerprint.
    loss_on: "all", or with a template "assistant": which positions count.
    vocab_size: the width of the teacher's head; ids must lie below it.

    An empty document (of no tokens) has length 0; a plan leaves it out, and counts it. A null is an error, as all else
    that is no document: DataError, here or when the value is read, names file and row.
    """
    if template is not None and tokenizer is None:
        raise DataError("template: found one without a tokenizer; a conversation becomes text first, then ids.")
    for name, given, fingerprint in (
        ("tokenizer", tokenizer, tokenizer_fingerprint),
        ("template", template, template_fingerprint),
    ):
        if (given is None) != (not fingerprint):
            raise DataError(
                f"{name}_fingerprint: got {fingerprint!r} {'with' if given else 'without'} a {name}; what says which "
                "one it is belongs to it, so that a cache is never continued with another."
            )
    if loss_on not in ("all", "assistant"):
        raise DataError(f'loss_on: got {loss_on!r}; expected "all" or "assistant".')
    if loss_on == "assistant" and template is None:
        raise DataError('loss_on: found "assistant" without a template; only messages say whose turn it is.')
    limit = LARGEST_ID if vocab_size is None else vocab_size
    if isinstance(limit, bool) or not hasattr(limit, "__index__") or not 1 <= int(limit) <= LARGEST_ID:
        raise DataError(f"vocab_size: got {vocab_size!r}; expected an integer from 1 on.")
    columns, files = open_column(source, column, text_documents)
    chosen = {"tokenizer": tokenizer_fingerprint, "template": template_fingerprint, "loss_on": loss_on}
    if (cut := cut_at(columns)) not in (None, "line"):
        chosen["text_documents"] = str(cut)
    return Documents(columns, files, tokenizer, template, chosen, int(limit))


class Documents:
    """Documents by number; made by `open_documents`. For one thread at a time."""

    def __init__(
        self,
        columns: Sequence[Column],
        files: Sequence[Path],
        tokenizer: Tokenizer | None,
        template: Template | None,
        settings: dict[str, str],
        vocab_size: int,
    ) -> None:
        self._columns = columns
        self._files = files
        self._tokenizer = tokenizer
        self._template = template
        self._settings = settings
        self._vocab_size = vocab_size
        self._begins = np.cumsum([0, *(len(column) for column in columns)])
        self._opened = [_state(path) for path in files]

    @property
    def name(self) -> str:
        """Where they are from, for people."""
        if not self._files:
            return self._columns[0].where(0).partition(",")[0] if self._columns else "no data"
        first = str(self._files[0])
        return first if len(self._files) == 1 else f"{len(self._files):,} files ({first}, …)"

    @property
    def text_documents(self) -> str | None:
        """What makes up a document of its text files; None where there are none."""
        return cut_at(self._columns)

    @property
    def text_settings(self) -> dict[str, str]:
        """Fingerprints of tokenizer and template, loss_on and text_documents; empty where documents are ids."""
        return {name: value for name, value in self._settings.items() if value} if self._tokenizer else {}

    def __len__(self) -> int:
        return int(self._begins[-1])

    def __getitem__(self, number: int) -> Tokens:
        return self.read([number])

    def read(self, numbers: Sequence[int] | range | NDArray[Any]) -> Tokens:
        """The documents of these numbers, in this order. Ascending numbers are read at the speed of the format."""
        wanted = np.asarray(numbers, np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise DataError(f"document {wanted.max()}: there are {len(self)}, numbered from 0.")
        # consecutive rows are read at one go
        cuts = np.flatnonzero(np.diff(wanted) != 1) + 1
        runs = np.split(wanted, cuts) if len(wanted) else []
        files = np.unique(np.searchsorted(self._begins, wanted, side="right") - 1).tolist() if self._files else []
        with self._unchanged(files):
            return _concatenated([part for run in runs for part in self._range(int(run[0]), int(run[-1]) + 1)])

    def lengths(self, *, progress: bool = False) -> NDArray[np.int32]:
        """Tokens of each document, `[documents]`, in one pass over all of them that checks every value.

        progress: a bar on stderr. Ids are measured by Arrow's offsets; text has to be tokenised for it, which
        `lengths.py` keeps from being done twice.
        """
        found = np.zeros(len(self), np.int32)
        done = 0
        bar = tqdm(total=len(self), desc="lengths", unit="doc", unit_scale=True, disable=not progress)
        with bar, self._unchanged(range(len(self._files))):
            for part in self._range(0, len(self)):
                found[done : done + len(part.lengths)] = part.lengths
                done += len(part.lengths)
                bar.update(len(part.lengths))
        return found

    def fingerprint(self, *, progress: bool = False) -> str:
        """sha256 of all that decides the tokens: names (without folders), sizes and contents of the files, column,
        tokenizer, template, loss_on. Reads files that are not known yet; of what is in none, the values are hashed.
        """
        named = {"columns": [column.name for column in self._columns], **self._settings}
        whole = hashlib.sha256(json.dumps(named, sort_keys=True).encode())
        with self._unchanged(range(len(self._files))):
            hashes = files_sha256(self._files, progress=progress)
        for path, (digest, size) in zip(self._files, hashes, strict=True):
            whole.update(json.dumps([path.name, size, digest]).encode())
        if not self._files:
            with tqdm(desc="fingerprint", unit="B", unit_scale=True, unit_divisor=1024, disable=not progress) as bar:
                for block in self._contents():
                    whole.update(block)
                    bar.update(len(block))
        return whole.hexdigest()

    def where(self, number: int) -> str:
        """Where a document lies: its file and row."""
        index = int(np.searchsorted(self._begins, number, side="right")) - 1
        return self._columns[index].where(number - int(self._begins[index]))

    @contextmanager
    def _unchanged(self, files: Iterable[int]) -> Iterator[None]:
        """DataError where one of these files is not what it was when it was opened: before anything is read (a file
        that is mapped into memory and cut off kills the process), and afterwards, so that nothing else was read."""
        files = list(files)
        self._check_unchanged(files)
        yield
        self._check_unchanged(files)

    def _check_unchanged(self, files: list[int]) -> None:
        for index in files:
            path = self._files[index]
            if _state(path) != self._opened[index]:
                raise DataError(
                    f"{path}: the file was changed after it was opened. Start again when it is at rest; a capture that "
                    "was begun goes on only with the data it was begun with."
                )

    def _range(self, start: int, stop: int) -> Iterator[Tokens]:
        """Documents start to stop, a few megabytes at a time."""
        for column, begin in zip(self._columns, self._begins.tolist(), strict=False):
            first, last = max(start - begin, 0), min(stop - begin, len(column))
            step = rows_at_a_time(column.row_bytes)
            for row in range(first, last, step):
                yield self._tokens(column, row, column.read(row, min(row + step, last)))

    def _contents(self) -> Iterator[bytes]:
        """The values, in blocks that do not depend on what holds them."""
        for column in self._columns:
            for first in range(0, len(column), 256):
                values = column.read(first, min(first + 256, len(column)))
                if self._tokenizer is None:
                    part = self._tokens(column, first, values)
                    yield part.lengths.astype("<i8").tobytes()
                    yield part.tokens.astype("<i4").tobytes()
                else:
                    plain = values.to_pylist() if isinstance(values, pa.Array) else values
                    yield json.dumps(plain, sort_keys=True, default=str).encode()

    def _tokens(self, column: Column, first: int, values: Values) -> Tokens:
        """The tokens of a column's values, from row `first` on."""

        def where(row: int) -> str:
            named = f"{column.where(first + row)}, column {column.name!r}" if column.name else column.where(first + row)
            return named + ": "

        if isinstance(values, pa.Array):
            try:
                # damaged offsets would be followed anywhere
                values.validate(full=True)
            except pa.ArrowInvalid as error:
                raise DataError(
                    f"{where(0)}this row or one of the {len(values) - 1} after it is damaged ({error}). Fetch the file "
                    "again."
                ) from error
        mask: list[bool] | None = None
        if self._tokenizer is None:
            tokens, lengths = _arrow_ids(values, where) if isinstance(values, pa.Array) else _list_ids(values, where)
        else:
            parts, masks = [], []
            for row, value in enumerate(_plain(values, where, "messages" if self._template else "text")):
                ids, counts = self._encoded(value, partial(where, row))
                parts.append(ids)
                masks += counts
            tokens, lengths = _list_ids(parts, lambda row: where(row) + "from the tokenizer: ")
            mask = masks if self._template else None
        bad = np.flatnonzero((tokens < 0) | (tokens >= self._vocab_size))
        if len(bad):
            row = int(np.searchsorted(np.cumsum(lengths), bad[0], side="right"))
            place = int(bad[0] - lengths[:row].sum())
            raise DataError(
                f"{where(row)}found id {tokens[bad[0]]} at position {place}; ids from 0 to {self._vocab_size - 1} have "
                "a place in the teacher's head. Is this the teacher's tokenizer?"
            )
        counted = np.ones(len(tokens), bool) if mask is None else np.array(mask, bool)
        return Tokens(tokens.astype(np.int32, copy=False), lengths, counted)

    def _encoded(self, value: Any, where: Callable[[], str]) -> tuple[Sequence[int], list[bool]]:
        assert self._tokenizer is not None
        try:
            if self._template is None:
                return self._tokenizer(value), []
            return chat_tokens(value, self._template, self._tokenizer, self._settings["loss_on"])
        except NotChat as error:
            raise DataError(f"{where()}{error}") from error
        except Exception as error:
            who = "template or tokenizer" if self._template else "tokenizer"
            raise DataError(f"{where()}the {who} failed: {type(error).__name__}: {error}") from error


def cut_at(columns: Sequence[Column]) -> str | None:
    """What makes up a document of the text files among these; None where there are none."""
    return next((column.documents for column in columns if isinstance(column, TextColumn)), None)


def _state(path: Path) -> tuple[int, int]:
    """Size and time of change of a file."""
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(f"{path}: the file cannot be found any more ({error.strerror}). Bring it back.") from error
    return found.st_size, found.st_mtime_ns


def _arrow_ids(values: pa.Array, where: Callable[[int], str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Flat ids and lengths of an Arrow array of lists, by its offsets."""
    kind = values.type
    if pa.types.is_null(kind) and len(values):
        raise DataError(f"{where(0)}got null; expected a document. Drop such rows.")
    if not len(values):
        return np.empty(0, np.int32), np.empty(0, np.int64)
    if pa.types.is_fixed_size_list(kind):
        values, kind = values.cast(pa.list_(kind.value_type)), pa.list_(kind.value_type)
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_integer(kind.value_type):
        texts = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        raise DataError(f"{where(0)}got {kind}; expected lists of integers{', or a tokenizer' if texts else ''}.")
    _no_nulls(values, where)
    lengths = np.diff(values.offsets.to_numpy()).astype(np.int64)
    flat = values.flatten()
    if flat.null_count:
        place = int(np.flatnonzero(flat.is_null().to_numpy(zero_copy_only=False))[0])
        row = int(np.searchsorted(np.cumsum(lengths), place, side="right"))
        raise DataError(f"{where(row)}got null at position {place - int(lengths[:row].sum())}; expected an id.")
    return flat.to_numpy(), lengths


def _list_ids(values: Sequence[Any], where: Callable[[int], str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Flat ids and lengths of Python lists or arrays."""
    arrays = []
    for row, value in enumerate(values):
        if value is None:
            raise DataError(f"{where(row)}got null; expected a document. Drop such rows.")
        if isinstance(value, (str, bytes, dict)):
            hint = ", or a tokenizer" if isinstance(value, str) else ""
            raise DataError(f"{where(row)}got {type(value).__name__}; expected a list of integers{hint}.")
        try:
            array = np.asarray(value)
        except (ValueError, TypeError, RuntimeError) as error:
            raise DataError(f"{where(row)}found what is no list of integers ({error}).") from error
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            what = f"{array.dtype} of {array.ndim} dimensions" if array.ndim != 1 else _first_other(value)
            raise DataError(f"{where(row)}got {what}; expected a list of integers.")
        arrays.append(array if array.size else np.empty(0, np.int32))
    lengths = np.array([len(array) for array in arrays], np.int64)
    return np.concatenate(arrays) if arrays else np.empty(0, np.int32), lengths


def _first_other(values: Any) -> str:
    """The first of some values that is no integer."""
    for place, value in enumerate(values):
        if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
            return f"{'null' if value is None else type(value).__name__} at position {place}"
    return "numbers that no integer type holds"


def _plain(values: Values, where: Callable[[int], str], needed: str) -> list[Any]:
    """Text, or lists of messages, as Python's own."""
    if isinstance(values, pa.Array):
        _no_nulls(values, where)
        values = values.to_pylist()
    for row, value in enumerate(values):
        fits = isinstance(value, str) if needed == "text" else isinstance(value, (list, tuple))
        if value is None:
            raise DataError(f"{where(row)}got null; expected a document. Drop such rows.")
        if not fits:
            found = type(value).__name__
            hint = " (ids are taken as they are: give no tokenizer)" if found == "list" else ""
            hint = " (with a template)" if found == "str" else hint
            raise DataError(f"{where(row)}got {found}; expected {needed}{hint}.".replace("text are", "text is"))
    return list(values)


def _no_nulls(values: pa.Array, where: Callable[[int], str]) -> None:
    if values.null_count:
        row = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(f"{where(row)}got null; expected a document. Drop such rows.")


def _concatenated(parts: Sequence[Tokens]) -> Tokens:
    if len(parts) == 1:
        return parts[0]
    return Tokens(
        np.concatenate([np.empty(0, np.int32), *(part.tokens for part in parts)]),
        np.concatenate([np.empty(0, np.int64), *(part.lengths for part in parts)]),
        np.concatenate([np.empty(0, bool), *(part.loss_mask for part in parts)]),
    )
