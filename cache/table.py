"""A look at one sequence of a cache: a row a position, with what the teacher said there; as lists, or for pandas."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import CacheError, said

if TYPE_CHECKING:
    import pandas as pd

    from .reader import Cache

_SPACE = "▁"  # how pieces of SentencePiece begin that follow a space


def sequence_table(cache: "Cache", sequence: int, tokenizer: Any = None) -> "pd.DataFrame":
    """`sequence_columns` as a table of pandas. CacheError if that is not installed."""
    try:
        import pandas as pd
    except ImportError as error:
        raise CacheError(f"to_pandas: {said(error)}. Use `pip install pandas`.") from error
    columns = sequence_columns(cache, sequence, tokenizer)
    if "label" in columns:
        columns["label"] = pd.array(columns["label"], dtype="Int64")
    return pd.DataFrame(columns)


def sequence_columns(cache: "Cache", sequence: int, tokenizer: Any = None) -> dict[str, list[Any]]:
    """The positions of a sequence, as columns by name; those that the cache has:

    token: its id; text: the same, decoded. label: the id of the next token of the document, None at its end. Other
    inputs by their names. top: the teacher's top-k entries as (token, probability), best first, none where a position
    does not count. tail: the probability of all other tokens. draws: those that were drawn of them, as (token, times).

    tokenizer: an object with `decode(ids)`, such as one of transformers, or a list of names by id, as of classes.
    Tokens are then their text instead of their ids. CacheError if there is no such sequence.
    """
    arrays, name = cache.sequences([sequence]), _namer(tokenizer)
    columns: dict[str, list[Any]] = {}
    if "tokens" in arrays:
        columns["token"] = tokens = arrays["tokens"].tolist()
        if tokenizer is not None:
            columns["text"] = [name(token) for token in tokens]
        columns["label"] = [*tokens[1:], None]
        for last in cache.last_rows(sequence).tolist():
            columns["label"][last] = None
    columns |= {column: arrays[column].tolist() for column in cache.spec.inputs if column != "tokens"}
    used = arrays["logprobs"] > -np.inf
    drawn = used & (arrays["draws"] > 0) if "draws" in arrays else np.zeros_like(used)
    probability = np.exp(arrays["logprobs"].astype(np.float64))
    columns["top"] = _entries(arrays["ids"], probability, used & ~drawn, name)
    tail = np.exp(arrays["tail"][:, cache.spec.temperatures.index(1.0)].astype(np.float64))
    columns["tail"] = np.where(used.any(1), tail, np.nan).tolist()
    if "draws" in arrays:
        columns["draws"] = _entries(arrays["ids"], arrays["draws"], drawn, name)
    return columns


def _entries(ids: Any, values: Any, use: Any, name: Callable[[int], Any]) -> list[list[tuple[Any, Any]]]:
    """The entries of each row that are used, named, with their values."""
    return [
        [(name(i), value) for i, value in zip(ids[row].tolist(), values[row].tolist(), strict=True)]
        for ids, values, row in zip(ids, values, use, strict=True)
    ]


def _namer(tokenizer: Any) -> Callable[[int], Any]:
    """From an id to its text; without a tokenizer, to itself. Each is decoded once."""
    known: dict[int, Any] = {}

    def text(token: int) -> Any:
        if not hasattr(tokenizer, "decode"):
            return tokenizer[token] if token < len(tokenizer) else token
        found = tokenizer.decode([token])
        piece = getattr(tokenizer, "convert_ids_to_tokens", lambda _: "")(token)
        # decoded alone, it would have lost its space
        return f" {found}" if str(piece).startswith(_SPACE) and not found.startswith(" ") else found

    def name(token: int) -> Any:
        if token not in known:
            known[token] = text(token)
        return known[token]

    return name if tokenizer is not None else lambda token: token
