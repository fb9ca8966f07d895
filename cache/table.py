"""A look at one sequence of a cache, as a table of pandas: a row a position, with what the teacher said there."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import CacheError

if TYPE_CHECKING:
    import pandas as pd

    from .reader import Cache


def sequence_table(cache: "Cache", sequence: int, tokenizer: Any = None) -> "pd.DataFrame":
    """The positions of a sequence. The columns, those that the cache has:

    token: its id; text: the same, decoded. Other inputs by their names. label: the next token of the document, <NA> at
    its end. top: the teacher's entries as (token, probability), best first, none where a position does not count.
    tail: the probability of all other tokens. draws: of these, the drawn ones as (token, times).

    tokenizer: an object with `decode(ids)`, such as one of transformers, or a list of names by id, as of classes.
    Tokens are then their text instead of their ids.
    CacheError if there is no such sequence, and if pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise CacheError(f"to_pandas: {error}. Use `pip install pandas`.") from error
    arrays, name = cache.sequences([sequence]), _namer(tokenizer)
    columns: dict[str, Any] = {}
    if "tokens" in arrays:
        tokens = columns["token"] = arrays["tokens"].astype(np.int64)
        if tokenizer is not None:
            columns["text"] = [name(token) for token in tokens.tolist()]
        columns["label"] = pd.array(np.append(tokens[1:], 0), dtype="Int64")
        columns["label"][cache.last_rows(sequence)] = pd.NA
    columns |= {column: arrays[column] for column in cache.spec.inputs if column != "tokens"}
    drawn = arrays["draws"] if "draws" in arrays else np.zeros_like(arrays["ids"])
    used = arrays["logprobs"] > -np.inf
    rows = list(zip(arrays["ids"], np.exp(arrays["logprobs"].astype(np.float64)), drawn, used, strict=True))
    columns["top"] = [
        [(name(int(i)), float(p)) for i, p in zip(ids[use & (times == 0)], q[use & (times == 0)], strict=True)]
        for ids, q, times, use in rows
    ]
    mass = np.exp(arrays["tail"][:, cache.spec.temperatures.index(1.0)].astype(np.float64))
    columns["tail"] = np.where(used.any(1), mass, np.nan)
    if "draws" in arrays:
        columns["draws"] = [
            [(name(int(i)), int(n)) for i, n in zip(ids[times > 0], times[times > 0], strict=True)]
            for ids, _, times, _ in rows
        ]
    return pd.DataFrame(columns)


def _namer(tokenizer: Any) -> Callable[[int], Any]:
    """From an id to its text; without a tokenizer, to itself. Each is decoded once."""
    if tokenizer is None:
        return lambda token: token
    known: dict[int, Any] = {}

    def name(token: int) -> Any:
        if token not in known:
            if hasattr(tokenizer, "decode"):
                known[token] = tokenizer.decode([token])
            else:
                known[token] = tokenizer[token] if token < len(tokenizer) else token
        return known[token]

    return name
