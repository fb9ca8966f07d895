"""Documents whose kind is found: ids, text, messages, or prompts with completions; with what it needs to become ids."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..errors import DataError
from ..models.tokenizers import Tokenizer
from .columns import CONVERSATIONS, Column
from .documents import Documents, open_documents, pieces
from .records import Completion
from .sources import Source, open_source

COMPLETIONS = "prompts with completions"
_OF_MESSAGES = ("messages", CONVERSATIONS)
_INSPECTED_ROWS = 256  # of each file, until one shows the kind


def load_documents(
    source: Any,
    *,
    column: str | None = None,
    text_documents: str = "line",
    tokenizer: Tokenizer | Callable[[], Tokenizer | None] | None = None,
    loss_on: str = "all",
    vocab_size: int,
) -> Documents:
    """The documents of a source, whose column is found to hold ids, text or messages.

    source, column, text_documents, loss_on: see `open_documents`.
    tokenizer: for text and messages; token ids do not use it. Or a function that loads it, called only for these.
    vocab_size: the width of the teacher's LM head.

    Raises DataError if the column, the tokenizer and these settings do not fit together.
    """
    opened = open_source(source, column, text_documents)
    kind = detect_kind(opened.columns)
    _check_one_kind(opened, kind)
    if kind == "ids":
        _check_ids(opened)
    where = opened.columns[0].where(0) if opened.columns and len(opened.columns[0]) else "the source"
    if loss_on == "assistant" and kind in ("ids", "text"):
        raise DataError(
            f'loss_on: got "assistant", but {where} has {kind}; expected messages, or prompts with completions.'
        )
    if kind in ("ids", None):
        return open_documents(opened, vocab_size=vocab_size, loss_on="all")
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        tokenizer = tokenizer()
    if tokenizer is None:
        raise DataError(f"{where}: got {kind} without a tokenizer. Name one (--tokenizer).")
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"tokenizer {tokenizer.name}: got ids up to {tokenizer.vocab_size - 1}; expected up to {vocab_size - 1}, "
            "those of the teacher's LM head. Is this the teacher's tokenizer?"
        )
    if kind in ("text", COMPLETIONS):
        return open_documents(
            opened,
            tokenizer=tokenizer.encode,
            tokenizer_fingerprint=tokenizer.fingerprint,
            completions=tokenizer.encode_completion if kind == COMPLETIONS else None,
            loss_on=loss_on,
            vocab_size=vocab_size,
        )
    return open_documents(
        opened,
        tokenizer=tokenizer.encode_chat,
        # without the end-of-document token, which is not appended to conversations
        tokenizer_fingerprint=f"sha256 {tokenizer.identity}",
        template=tokenizer.template,
        template_fingerprint=tokenizer.template_fingerprint,
        loss_on=loss_on,
        vocab_size=vocab_size,
    )


def _check_one_kind(source: Source, kind: str | None) -> None:
    """DataError if the first files of another suffix, or with another column, hold documents of another kind."""
    first: dict[tuple[str, str], tuple[Path, Column]] = {}
    for path, column in zip(source.files, source.columns, strict=False):
        first.setdefault((path.suffix.lower(), column.name), (path, column))
    for path, column in list(first.values())[1:]:
        if (other := detect_kind([column])) not in (kind, None):
            raise DataError(
                f"{path}: got {other}, and {kind} in {source.files[0]}; expected one kind of documents. Capture "
                "each into its own cache, and train on both."
            )


def _check_ids(source: Source) -> None:
    """DataError for token ids in a column that is named after messages."""
    if (column := next((c for c in source.columns if c.name in _OF_MESSAGES), None)) is not None:
        raise DataError(
            f"{column.where(0)}, or one of the first rows: got token ids, or what is none, in column {column.name!r}; "
            "expected messages, such as [{'role': 'user', 'content': 'Hello'}, ...]. Name a column of token ids "
            "input_ids."
        )


def detect_kind(columns: Sequence[Column]) -> str | None:
    """What the first rows hold: "ids", "text", "messages" or `COMPLETIONS`; None if they are all empty or null.

    Anything else counts as "ids"; reading it names the error.
    """
    for column in columns:
        for first, values in pieces(column, 0, min(_INSPECTED_ROWS, len(column))):
            for row, value in enumerate(values, first):
                try:
                    known = _kind_of_value(value.as_py() if isinstance(value, pa.Scalar) else value)
                except (pa.ArrowException, ValueError) as error:
                    raise DataError(f"{column.where(row)}: cannot be read ({error}).") from error
                if known is not None:
                    return known
    return None


def _kind_of_value(value: Any) -> str | None:
    if isinstance(value, Completion):
        return COMPLETIONS
    if isinstance(value, str):
        return "text"
    if value is None or not hasattr(value, "__len__") or not len(value):
        return None
    first = value[0] if not isinstance(value, Mapping) else None
    return "messages" if isinstance(first, Mapping) else "ids"
