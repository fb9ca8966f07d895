"""From any source to its documents: detects whether the column holds ids, text or messages."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from ..errors import DataError
from ..models.tokenizers import Tokenizer
from .columns import Column
from .documents import Documents, open_documents
from .sources import open_source

_INSPECTED_ROWS = 256  # of each file, until one shows the kind


def load_documents(
    source: Any,
    *,
    column: str | None = None,
    text_documents: str = "line",
    tokenizer: Tokenizer | None = None,
    loss_on: str = "all",
    vocab_size: int,
) -> Documents:
    """The documents of a source whose column holds ids, text or messages.

    source, column, text_documents, loss_on: see `open_documents`.
    tokenizer: needed for text and messages; not used for ids.
    vocab_size: the width of the teacher's LM head.

    Raises DataError if the column, the tokenizer and these settings do not fit together.
    """
    opened = open_source(source, column, text_documents)
    kind = detect_kind(opened.columns)
    where = opened.columns[0].where(0) if opened.columns and len(opened.columns[0]) else "the source"
    if loss_on == "assistant" and kind in ("ids", "text"):
        raise DataError(f'loss_on: got "assistant", but {where} has {kind}; only messages have roles.')
    if kind in ("ids", None):
        return open_documents(opened, vocab_size=vocab_size, loss_on="all")
    if tokenizer is None:
        raise DataError(f"{where}: got {kind} without a tokenizer. Name one (--tokenizer).")
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"tokenizer {tokenizer.name}: got ids up to {tokenizer.vocab_size - 1}; expected up to {vocab_size - 1}, "
            "those of the teacher's LM head. Is this the teacher's tokenizer?"
        )
    if kind == "text":
        encode, fingerprint = tokenizer.encode, tokenizer.fingerprint
        return open_documents(opened, tokenizer=encode, tokenizer_fingerprint=fingerprint, vocab_size=vocab_size)
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


def detect_kind(columns: Sequence[Column]) -> str | None:
    """What the first rows hold: "ids", "text" or "messages"; None if they are all empty or null.

    Anything else counts as "ids"; reading it names the error.
    """
    for column in columns:
        values = column.read(0, min(_INSPECTED_ROWS, len(column)))
        if isinstance(values, pa.Array) and (known := _kind_of_type(values.type)) is not None:
            return known
        for value in values.to_pylist() if isinstance(values, pa.Array) else values:
            if (known := _kind_of_value(value)) is not None:
                return known
    return None


def _kind_of_type(kind: pa.DataType) -> str | None:
    types = pa.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_string(kind) or types.is_large_string(kind):
        return "text"
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    if not is_list or types.is_null(kind.value_type):
        return None
    return "messages" if types.is_struct(kind.value_type) else "ids"


def _kind_of_value(value: Any) -> str | None:
    if isinstance(value, str):
        return "text"
    if value is None or not hasattr(value, "__len__") or not len(value):
        return None
    first = value[0] if not isinstance(value, Mapping) else None
    return "messages" if isinstance(first, Mapping) else "ids"
