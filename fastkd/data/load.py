"""From a source of any kind to its documents: what its column holds is looked at, and read accordingly."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from ..errors import DataError
from ..models.tokenizers import Tokenizer
from .columns import Column
from .documents import Documents, open_documents
from .sources import Opened, open_column

_LOOKED_AT = 256  # rows at most, of each file, until one shows what they are


def documents_of(
    source: Any,
    *,
    column: str | None = None,
    text_documents: str = "line",
    tokenizer: Tokenizer | None = None,
    chat: bool | str = "auto",
    loss_on: str = "all",
    vocab_size: int,
) -> Documents:
    """The documents of a source, whose column holds ids, text or messages.

    source, column, text_documents, loss_on: see `open_documents`.
    tokenizer: makes ids of text and of messages; ids are taken as they are, without it.
    chat: True: messages are needed; False: they are refused; "auto": the column decides.
    vocab_size: the width of the teacher's head.

    Raises DataError where what is there, is needed and was asked for do not fit together.
    """
    if chat not in (True, False, "auto"):
        raise DataError(f'chat: got {chat!r}; expected True, False or "auto".')
    opened = Opened(*open_column(source, column, text_documents))
    kind = kind_of(opened.columns)
    where = opened.columns[0].where(0) if opened.columns and len(opened.columns[0]) else "the source"
    if chat != "auto" and kind is not None and (kind == "messages") != chat:
        asked = "messages were asked for" if chat else "no messages were asked for"
        raise DataError(f"{where} and on: got {kind}, where {asked}. Name another column, or leave chat out.")
    if loss_on == "assistant" and kind in ("ids", "text"):
        raise DataError(f'{where} and on: got {kind}, with loss_on="assistant"; only messages say whose turn it is.')
    if kind in ("ids", None):
        return open_documents(opened, vocab_size=vocab_size, loss_on="all")
    if tokenizer is None:
        raise DataError(f"{where} and on: got {kind}, and no tokenizer to make ids of it. Name one (--tokenizer).")
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"tokenizer {tokenizer.name}: found ids up to {tokenizer.vocab_size - 1}; those to {vocab_size - 1} have a "
            "place in the teacher's head. Is this the teacher's tokenizer?"
        )
    if kind == "text":
        return open_documents(
            opened,
            tokenizer=tokenizer.encode,
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=vocab_size,
        )
    return open_documents(
        opened,
        tokenizer=tokenizer.encode_chat,
        # nothing is appended to a conversation
        tokenizer_fingerprint=f"sha256 {tokenizer.identity}",
        template=tokenizer.template,
        template_fingerprint=tokenizer.template_fingerprint,
        loss_on=loss_on,
        vocab_size=vocab_size,
    )


def kind_of(columns: Sequence[Column]) -> str | None:
    """What the first rows are: "ids", "text" or "messages"; None where they do not show it.

    Whatever is none of these counts as ids, which says what is wrong when it is read.
    """
    for column in columns:
        values = column.read(0, min(_LOOKED_AT, len(column)))
        if isinstance(values, pa.Array) and (known := _of_type(values.type)) is not None:
            return known
        for value in values.to_pylist() if isinstance(values, pa.Array) else values:
            if (known := _of_value(value)) is not None:
                return known
    return None


def _of_type(kind: pa.DataType) -> str | None:
    """What Arrow's type says, by itself."""
    types = pa.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_string(kind) or types.is_large_string(kind):
        return "text"
    if not (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)):
        return None
    if types.is_null(kind.value_type):
        return None
    return "messages" if types.is_struct(kind.value_type) else "ids"


def _of_value(value: Any) -> str | None:
    if isinstance(value, str):
        return "text"
    if value is None or not hasattr(value, "__len__") or not len(value):
        return None
    first = value[0] if not isinstance(value, Mapping) else None
    return "messages" if isinstance(first, Mapping) else "ids"
