"""vLLM's `/v1/completions` with `prompt_logprobs`: for each token of a prompt, what was likely in its place.

An entry of the first token is null. The actual token is among the entries of a position, with its rank, also if it is
not among the k most likely; it is then dropped. `--max-logprobs` of the server limits k (20 by default).
"""

import re
from functools import cache
from typing import Any

import numpy as np

from .apis import (
    OUT_OF_VOCABULARY,
    UNUSED,
    Entries,
    Served,
    check_count,
    decoder,
    json_object,
    limit_in_refusal,
    to_json,
    whole_number,
)
from .client import BadAnswer, ServerClient

PATH = "/v1/completions"
MAX_K_IS = "as the server was started with --max-logprobs of that. Start it with a larger one, or use a smaller --k."

_VOCABULARY = re.compile(r"Vocabulary size:\s*(\d+)")
_MAX_LOGPROBS = re.compile(r"max allowed:\s*(\d+)")


@cache
def _decode() -> Any:
    """An answer, as far as it is read. An entry's key is its token id."""
    from msgspec import defstruct

    entry = defstruct("Entry", [("logprob", float), ("rank", int | None, None)], gc=False)
    rows = list[dict[int, entry] | None]  # type: ignore[valid-type]
    choice = defstruct("Choice", [("prompt_logprobs", rows | None, None)])
    return decoder(defstruct("Completion", [("choices", list[choice])]))  # type: ignore[valid-type]


def describe(client: ServerClient, model: dict[str, Any]) -> Served:
    """What the server says, some of it when it refuses what no server grants."""
    version = client.ask("/version", json_object).get("version", "")
    name = str(model["id"])

    def refused(pattern: re.Pattern[str], **options: Any) -> int | None:
        return limit_in_refusal(client, PATH, {"model": name, "prompt": [0], "max_tokens": 1, **options}, pattern)

    return Served(
        engine=f"vLLM {version}".strip(),
        model=name,
        root=str(model.get("root") or ""),
        max_length=whole_number(model.get("max_model_len")),
        vocab_size=refused(_VOCABULARY, logit_bias={str(OUT_OF_VOCABULARY): 1.0}),
        max_k=refused(_MAX_LOGPROBS, prompt_logprobs=OUT_OF_VOCABULARY),
    )


def request(served: Served, tokens: list[int], k: int) -> bytes:
    """See `Api`."""
    return to_json(
        {
            "model": served.model,
            "prompt": tokens,
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": k,
            "add_special_tokens": False,
        }
    )


def parse(body: bytes, length: int, k: int) -> Entries:
    """See `Api`."""
    choices = _decode()(body).choices
    rows = choices[0].prompt_logprobs if choices else None
    if rows is None:
        raise BadAnswer("an answer without prompt_logprobs")
    check_count(len(rows), length + 1)
    said = [row for row in rows[1:] if row]
    check_count(len(said), length)
    count = np.fromiter(map(len, said), np.int64, length)
    total = int(count.sum())
    ids = np.fromiter((token for row in said for token in row), np.int64, total)
    entries = [entry for row in said for entry in row.values()]
    logprobs = np.fromiter((entry.logprob for entry in entries), np.float64, total)
    ranks = np.fromiter((0 if entry.rank is None else entry.rank for entry in entries), np.int64, total)
    row = np.repeat(np.arange(length), count)
    kept = ranks <= k
    ids, logprobs, row = ids[kept], logprobs[kept], row[kept]
    return pack(ids, logprobs, row, length, k)


def pack(ids: Any, logprobs: Any, row: Any, length: int, k: int) -> Entries:
    """Entries one row after another, to `[length, k]`."""
    count = np.bincount(row, minlength=length)
    if len(row) and int(count.max()) > k:
        raise BadAnswer(f"{int(count.max())} entries at a position; expected {k}")
    place = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    found = Entries(np.zeros((length, k), np.int32), np.full((length, k), -np.inf, np.float32))
    used = logprobs > UNUSED
    found.ids[row[used], place[used]] = ids[used]
    found.logprobs[row[used], place[used]] = logprobs[used]
    return found
