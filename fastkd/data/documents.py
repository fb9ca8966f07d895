"""Documents as token ids, by number: from files, a Hugging Face Dataset, or memory; from ids, text or conversations.

docs = open_documents("corpus/*.parquet", column="input_ids", vocab_size=49152)
lengths = docs.lengths(progress=True)  # one streaming pass that checks every value
batch = docs.read([3, 4, 10])  # tokens, lengths, loss_mask
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

from ..errors import DataError
from ..utils.hashing import files_sha256
from ..utils.progress import counting
from .chat import Encode, InvalidChat, Template, chat_tokens
from .columns import TEXT_SETTINGS, Column, Values, concat_arrays
from .records import Completion
from .sources import Source, open_source
from .token_ids import check_range, flat_ids, texts_or_chats

LARGEST_ID = 2**31 - 1
_LONG = 2**16  # tokens of a document that is worth keeping
SHORT = 32  # tokens; a line of 80 to 120 columns has some 20
EncodePair = Callable[[str, str], tuple[Sequence[int], int]]
"""A prompt and its completion to token ids, and the number of the prompt's."""
_PER_DOCUMENT = {"line": "one per line", "blank-line": "one per paragraph", "file": "one per file"}


@dataclass(frozen=True, eq=False)
class Tokens:
    """n tokens of d documents, concatenated.

    tokens: int32 `[n]`. lengths: int64 `[d]`, 0 for an empty document. loss_mask: bool `[n]`, whether the teacher's
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
    tokenizer: Encode | None = None,
    tokenizer_fingerprint: str = "",
    template: Template | None = None,
    template_fingerprint: str = "",
    completions: EncodePair | None = None,
    loss_on: str = "all",
    vocab_size: int | None = None,
) -> "Documents":
    """The documents of a source. Reads only metadata, and of text files the line ends.

    source: a file, a folder, a pattern, or a list of `Path`s; Parquet, Arrow (file or stream), JSON (lines, or an
        array), CSV, plain text or source files, by suffix (see files.py). Or a Hugging Face `Dataset`. Or in memory: a
        sequence of documents or of dictionaries, a 2-d array, an Arrow table or array. Rows are numbered from 0 through
        all files.
    column: its name; may be left out if there is one column, one of `input_ids`, `tokens`, `text`, `messages`, or if
        the columns say what they are (see records.py).
    text_documents: what a document of a text file is: a "line", a paragraph ("blank-line"), or a "file"; a source file
        is one, unless it is divided by paragraph.
    tokenizer: text to ids (it appends the end-of-document token, if any), with tokenizer_fingerprint, which identifies
        it. Without a tokenizer, the column holds ids.
    template: messages to text, for a column of messages (see chat.py), with template_fingerprint.
    completions: beside a tokenizer, for documents of a prompt and its completion: both to ids, and how many of these
        are the prompt's.
    loss_on: which positions count: "all", or with a template or with completions "assistant".
    vocab_size: the width of the teacher's LM head; ids must be smaller.

    An empty document has length 0; a window plan counts it and leaves it out. A null, or anything else that is not a
    document, raises DataError, here or when the value is read, naming file and row.
    """
    if template is not None and tokenizer is None:
        raise DataError("template: got one without a tokenizer; a conversation becomes text first, then ids.")
    for name, given, fingerprint in (
        ("tokenizer", tokenizer, tokenizer_fingerprint),
        ("template", template, template_fingerprint),
    ):
        if (given is None) != (not fingerprint):
            raise DataError(
                f"{name}_fingerprint: got {fingerprint!r} {'with' if given else 'without'} a {name}; expected one for "
                f"every {name}, so that a cache is never continued with another."
            )
    if loss_on not in ("all", "assistant"):
        raise DataError(f'loss_on: got {loss_on!r}; expected "all" or "assistant".')
    if loss_on == "assistant" and template is None and completions is None:
        raise DataError('loss_on: got "assistant" without a template; only messages have roles.')
    limit = LARGEST_ID if vocab_size is None else vocab_size
    if isinstance(limit, bool) or not hasattr(limit, "__index__") or not 1 <= int(limit) <= LARGEST_ID:
        raise DataError(f"vocab_size: got {vocab_size!r}; expected an integer from 1 on.")
    opened = open_source(source, column, text_documents)
    settings = {"tokenizer": tokenizer_fingerprint, "template": template_fingerprint, "loss_on": loss_on}
    if opened.text_documents not in (None, "line"):
        settings["text_documents"] = str(opened.text_documents)
    return Documents(opened, tokenizer, template, settings, int(limit), completions)


class Documents:
    """Documents by number; made by `open_documents`. For one thread at a time."""

    def __init__(
        self,
        source: Source,
        tokenizer: Encode | None,
        template: Template | None,
        settings: dict[str, str],
        vocab_size: int,
        completions: EncodePair | None = None,
    ) -> None:
        self._columns = source.columns
        self._stated = {} if tokenizer else source.stated
        self._loss_masks = source.loss_masks() if self._stated else []
        self._files = source.files
        self.left_out = source.left_out
        """Files in its folders that are not read; see `files_of`."""
        self.text_documents = source.text_documents
        """What a document of its text files is, see `open_documents`; None without text files."""
        self._tokenizer = tokenizer
        self._template, self._completions = template, completions
        self._settings = settings
        self._vocab_size = vocab_size
        self._starts = np.cumsum([0, *(len(column) for column in self._columns)])  # first document of each column
        self._file_states = [_file_state(path) for path in self._files]
        self._kept: dict[int, Tokens] = {}  # long documents that were read last, by number

    @property
    def name(self) -> str:
        """Where the documents come from, for messages."""
        if not self._files:
            return self._columns[0].where(0).partition(",")[0] if self._columns else "no data"
        first = str(self._files[0])
        return first if len(self._files) == 1 else f"{len(self._files):,} files ({first}, …)"

    @property
    def text_settings(self) -> dict[str, str]:
        """Fingerprints of tokenizer and template, loss_on and text_documents, if they apply; of ids, what their files
        state, if anything."""
        if self._tokenizer is None:
            return dict(json.loads(self._stated.get(TEXT_SETTINGS, "{}")))
        return {name: value for name, value in self._settings.items() if value}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number: int) -> Tokens:
        return self.read([number])

    def read(self, numbers: Sequence[int] | range | NDArray[Any]) -> Tokens:
        """The documents of these numbers, in this order. Ascending numbers are read fastest.

        The first and the last long one are kept until the next call: a document that continues in another shard is
        tokenized once, not once a shard.
        """
        wanted = np.asarray(numbers, np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise DataError(f"document {wanted.max()}: there are {len(self)}, numbered from 0.")
        # consecutive rows are read together
        known = np.isin(wanted, list(self._kept))
        cuts = np.flatnonzero((np.diff(wanted) != 1) | known[1:] | known[:-1]) + 1
        files = np.unique(np.searchsorted(self._starts, wanted, side="right") - 1).tolist() if self._files else []
        parts: list[Tokens] = []
        with self._unchanged(files):
            for run in np.split(wanted, cuts) if len(wanted) else []:
                first = int(run[0])
                parts += [self._kept[first]] if first in self._kept else self._range(first, int(run[-1]) + 1)
        found = _concatenate(parts)
        ends = np.cumsum(found.lengths)
        long = np.flatnonzero(found.lengths >= _LONG)
        kept = {}
        for i in {*long[:1].tolist(), *long[-1:].tolist()}:
            number, of = int(wanted[i]), slice(int(ends[i] - found.lengths[i]), int(ends[i]))
            kept[number] = self._kept.get(number) or Tokens(
                found.tokens[of].copy(), found.lengths[i : i + 1], found.loss_mask[of].copy()
            )
        self._kept = kept
        return found

    def lengths(self, *, progress: bool = False, on_part: Callable[[], None] | None = None) -> NDArray[np.int32]:
        """Tokens of each document, `[documents]`, in one pass that checks every value.

        progress: a bar on stderr. on_part: called every few megabytes. Ids are measured by Arrow's offsets; text has to
        be tokenized.
        """
        lengths = np.zeros(len(self), np.int32)
        done = 0
        bar = counting(len(self), "document", "lengths", shown=progress)
        with bar, self._unchanged(range(len(self._files))):
            for part in self._range(0, len(self)):
                lengths[done : done + len(part.lengths)] = part.lengths
                done += len(part.lengths)
                bar.add(len(part.lengths))
                if on_part is not None:
                    on_part()
        return lengths

    def fingerprint(self, *, progress: bool = False) -> str:
        """sha256 of everything that decides the tokens: names (without folders), sizes and contents of the files,
        column, tokenizer, template, loss_on. Files are hashed once (see utils/hashing.py); values in memory every time.
        """
        named = {"columns": [column.name for column in self._columns], **self._settings, **self._stated}
        whole = hashlib.sha256(json.dumps(named, sort_keys=True).encode())
        with self._unchanged(range(len(self._files))):
            hashes = files_sha256(self._files, progress=progress)
        for path, (digest, size) in zip(self._files, hashes, strict=True):
            whole.update(json.dumps([path.name, size, digest]).encode())
        if not self._files:
            with counting(0, "byte", "fingerprint", shown=progress) as bar:
                for block in self._value_bytes():
                    whole.update(block)
                    bar.add(len(block))
        return whole.hexdigest()

    def where(self, number: int) -> str:
        """The file and row of a document, for messages."""
        index = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._columns[index].where(number - int(self._starts[index]))

    @contextmanager
    def _unchanged(self, files: Iterable[int]) -> Iterator[None]:
        """DataError if one of these files changed since it was opened: checked before reading (a memory-mapped file
        that was truncated kills the process), and after, so that nothing else was read."""
        files = list(files)
        self._check_unchanged(files)
        yield
        self._check_unchanged(files)

    def _check_unchanged(self, files: list[int]) -> None:
        for index in files:
            path = self._files[index]
            if _file_state(path) != self._file_states[index]:
                raise DataError(
                    f"{path}: the file was changed after it was opened. Start again once it is complete; a capture "
                    "continues only with the data it was started with."
                )

    def _range(self, start: int, stop: int) -> Iterator[Tokens]:
        """Documents start to stop, a few megabytes at a time."""
        for column, begin in zip(self._columns, self._starts.tolist(), strict=False):
            for row, values in pieces(column, max(start - begin, 0), min(stop - begin, len(column))):
                yield self._tokens(column, row, values)

    def _value_bytes(self) -> Iterator[bytes]:
        """The values as bytes, in blocks that do not depend on the container."""
        for column in self._columns:
            for first in range(0, len(column), 256):
                values = _whole([part for _, part in pieces(column, first, min(first + 256, len(column)))])
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
            named = f", column {column.name!r}" if column.name else ""
            return f"{column.where(first + row)}{named}: "

        loss_mask: Any = None
        if self._tokenizer is None:
            ids, lengths = flat_ids(values, where)
            loss_mask = self._loss_mask(column, first, lengths, where)
        else:
            parts, masks = [], []
            for row, value in enumerate(texts_or_chats(values, where, chats=self._template is not None)):
                part, mask = self._encode(value, partial(where, row))
                parts.append(part)
                masks += mask
            ids, lengths = flat_ids(parts, lambda row: where(row) + "from the tokenizer: ")
            loss_mask = masks if self._template or self._completions else None
        check_range(ids, lengths, self._vocab_size, where)
        counts = np.ones(len(ids), bool) if loss_mask is None else np.array(loss_mask, bool)
        return Tokens(ids.astype(np.int32, copy=False), lengths, counts)

    def _loss_mask(
        self, column: Column, first: int, lengths: NDArray[np.int64], where: Callable[[int], str]
    ) -> NDArray[np.bool_] | None:
        """The loss mask of a column's token ids from row `first` on, if its file has one. lengths: of its documents."""
        if not self._loss_masks:
            return None
        beside = self._loss_masks[self._columns.index(column)]
        parts: list[Any] = [part for _, part in pieces(beside, first, first + len(lengths))]
        lists = concat_arrays(parts)
        if parts and not (pa.types.is_list(lists.type) and pa.types.is_boolean(lists.type.value_type)):
            raise DataError(
                f"{where(0)}got {lists.type} in column {beside.name!r}, the loss mask; expected lists of bool."
            )
        flat = lists.flatten() if parts else pa.array([], pa.bool_())
        sizes = np.diff(lists.offsets.to_numpy()) if parts else np.zeros(0, np.int64)
        if lists.null_count * bool(parts) or flat.null_count or len(bad := np.flatnonzero(sizes != lengths)):
            row = int(bad[0]) if not flat.null_count and not lists.null_count else 0
            raise DataError(
                f"{where(row)}got {lengths[row]} token ids, and {sizes[row]} values in {beside.name!r}, its loss mask; "
                "expected a value for each, and no nulls."
            )
        found: NDArray[np.bool_] = flat.to_numpy(zero_copy_only=False)
        return found

    def _encode(self, value: Any, where: Callable[[], str]) -> tuple[Sequence[int], list[bool]]:
        """The ids of a text or a conversation, and of the latter the loss mask."""
        assert self._tokenizer is not None
        try:
            if isinstance(value, Completion):
                return self._encode_pair(value)
            if self._template is None:
                ids = self._tokenizer(value)
                return ids, [True] * len(ids) if self._completions else []
            return chat_tokens(value, self._template, self._tokenizer, self._settings["loss_on"])
        except InvalidChat as error:
            raise DataError(f"{where()}{error}") from error
        except Exception as error:
            failed = "template or tokenizer" if self._template else "tokenizer"
            raise DataError(f"{where()}the {failed} failed: {type(error).__name__}: {error}") from error

    def _encode_pair(self, value: Completion) -> tuple[Sequence[int], list[bool]]:
        """The ids of a prompt with its completion, and their loss mask."""
        assert self._tokenizer is not None
        if self._settings["loss_on"] == "all":
            return (ids := self._tokenizer(value.prompt + value.completion)), [True] * len(ids)
        if self._completions is None:
            raise InvalidChat("got a prompt and its completion; expected completions= beside the tokenizer.")
        ids, prompt = self._completions(*value)
        # a position counts if the token that follows it is of the completion
        return ids, [prompt <= i + 1 < len(ids) for i in range(len(ids))]


def _file_state(path: Path) -> tuple[int, int]:
    """Size and modification time of a file."""
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(f"{path}: the file is gone ({error.strerror}). Bring it back.") from error
    return found.st_size, found.st_mtime_ns


def pieces(column: Column, start: int, stop: int) -> Iterator[tuple[int, Values]]:
    """The values of rows start to stop, a few megabytes at a time, with the first row of each piece."""
    while start < stop:
        values = column.read(start, stop)
        if not len(values):
            raise DataError(f"{column.where(start)}: got no rows; expected {stop - start}. Fetch the data again.")
        yield start, values
        start += len(values)


def _whole(parts: list[Any]) -> Values:
    return concat_arrays(parts) if isinstance(parts[0], pa.Array) else [value for part in parts for value in part]


def _concatenate(parts: list[Tokens]) -> Tokens:
    if len(parts) == 1:
        return parts[0]
    parts = [Tokens(np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, bool)), *parts]
    return Tokens(*(np.concatenate([getattr(part, name) for part in parts]) for name in Tokens.__annotations__))


def describe_documents(data: Documents, lengths: NDArray[np.int32]) -> list[str]:
    """Number and median length of the documents, in one line; then files that are left out, and a warning if the lines
    of a text file seem to belong to longer documents. lengths: in tokens, `[documents]`."""
    nonzero = lengths[lengths > 0]
    median = int(np.median(nonzero)) if len(nonzero) else 0
    documents, tokens = (f"{n:,} {noun}{'s' * (n != 1)}" for n, noun in ((len(lengths), "document"), (median, "token")))
    line = f"{data.name}: {documents}, median length {tokens}"
    lines = [line if data.text_documents is None else f"{line}, {_PER_DOCUMENT[data.text_documents]}"]
    if data.left_out:
        count, first = len(data.left_out), data.left_out[0]
        lines.append(
            f"note: {count:,} other file{'s' * (count > 1)} of {first.parent} {'are' if count > 1 else 'is'} not read "
            f"({first.name}{', …' * (count > 1)}). Name files by a pattern to read those."
        )
    if data.text_documents == "line" and len(nonzero) > 1 and median < SHORT:
        lines.append(
            f"warning: half of the lines of {data.name} have {median:,} tokens or fewer, and every line is a separate "
            "document, without context from the others. If the lines belong to longer texts, use --text-documents "
            "blank-line (one document per paragraph) or file (one per file)."
        )
    return lines
