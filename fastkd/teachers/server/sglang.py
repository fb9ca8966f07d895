"""SGLang's `/generate` with `return_logprob`: for each token of a prompt, what was likely in its place.

A server that has it answers in two arrays, base64 of float32 and int32 (`return_flat_raw_top_logprobs_b64`); an older
one ignores the flag, and answers with a list `[logprob, id, text]` for each entry. The first token has none.
"""

import base64
import binascii
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

PATH = "/generate"
MAX_K_IS = "the entries of this server's answers."

_VOCABULARY = re.compile(r"valid range is \[0, (\d+)\)")
_DTYPES = {"float32": "<f4", "float16": "<f2", "float64": "<f8", "int32": "<i4", "int64": "<i8"}


@cache
def _decode() -> Any:
    """An answer, as far as it is read: in the flat form, or the nested one."""
    from msgspec import defstruct

    side = "input_top_logprobs"
    meta = defstruct(
        "Meta",
        [
            ("nested", list[list[tuple[float | None, int, Any]] | None] | None, None),
            ("values", str | list[float | None] | None, None),
            ("ids", str | list[int] | None, None),
            ("values_dtype", str, "float32"),
            ("ids_dtype", str, "int32"),
            ("shape", list[int] | None, None),
            ("null_prefix", int, 0),
        ],
        rename={
            "nested": side,
            "values": f"{side}_val_flat_b64",
            "ids": f"{side}_idx_flat_b64",
            "values_dtype": f"{side}_val_flat_b64_dtype",
            "ids_dtype": f"{side}_idx_flat_b64_dtype",
            "shape": f"{side}_shape",
            "null_prefix": f"{side}_null_prefix",
        },
    )
    return decoder(defstruct("Generated", [("meta_info", meta)]))


def describe(client: ServerClient, model: dict[str, Any]) -> Served:
    """What the server says, some of it when it refuses what no server grants."""
    info = _first(client, "/model_info", "/get_model_info")
    server = _first(client, "/server_info", "/get_server_info")
    body = {
        "input_ids": [0],
        "sampling_params": {"max_new_tokens": 1},
        "return_logprob": True,
        "token_ids_logprob": [OUT_OF_VOCABULARY],
    }
    version = str(info.get("weight_version") or "")
    return Served(
        engine=f"SGLang {server.get('version', '')}".strip(),
        model=str(model["id"]),
        root=str(info.get("model_path") or ""),
        max_length=whole_number(model.get("max_model_len")),
        vocab_size=limit_in_refusal(client, PATH, body, _VOCABULARY),
        version="" if version == "default" else version,
    )


def request(served: Served, tokens: list[int], k: int) -> bytes:
    """See `Api`."""
    return to_json(
        {
            "input_ids": tokens,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": k,
            "return_text_in_logprobs": False,
            "return_flat_raw_top_logprobs": True,
            "return_flat_raw_top_logprobs_b64": True,
        }
    )


def parse(body: bytes, length: int, k: int) -> Entries:
    """See `Api`."""
    meta = _decode()(body).meta_info
    if meta.nested is not None:
        ids, logprobs = _nested(meta.nested, length, k)
    else:
        ids, logprobs = _flat(meta, length)
    used = logprobs[:, :k] > UNUSED  # not NaN either, which is for others to refuse
    bad = np.isnan(logprobs[:, :k])
    kept = np.where(used | bad, logprobs[:, :k], -np.inf)
    return Entries(np.where(used, ids[:, :k], 0).astype(np.int32), kept.astype(np.float32))


def _flat(meta: Any, length: int) -> tuple[Any, Any]:
    shape = meta.shape
    if shape is None or len(shape) != 2 or shape[1] < 1:
        raise BadAnswer("an answer without top log-probabilities of its prompt")
    logprobs, ids = _array(meta.values, meta.values_dtype), _array(meta.ids, meta.ids_dtype)
    if len(ids) != len(logprobs) or len(ids) % shape[1]:
        raise BadAnswer(
            f"{len(logprobs)} log-probabilities and {len(ids)} ids; expected as many, {shape[1]} a position"
        )
    # the first position has no entries; some versions count it in the shape, so the arrays decide
    check_count(meta.null_prefix, 1)
    check_count(len(ids) // shape[1], length)
    return ids.reshape(length, shape[1]), logprobs.reshape(length, shape[1])


def _array(text: str | None, dtype: str) -> Any:
    if text is None or dtype not in _DTYPES:
        raise BadAnswer(f"an answer without top log-probabilities of its prompt, or of the unknown type {dtype[:20]!r}")
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), _DTYPES[dtype])
    except (ValueError, binascii.Error) as error:
        raise BadAnswer(f"arrays that are no base64 of {dtype}") from error


def _nested(rows: list[Any], length: int, k: int) -> tuple[Any, Any]:
    check_count(len(rows), length + 1)
    said = [row for row in rows[1:] if row]
    check_count(len(said), length)
    width = max(map(len, said), default=k)
    ids, logprobs = np.zeros((length, width), np.int64), np.full((length, width), -np.inf)
    for number, row in enumerate(said):
        ids[number, : len(row)] = [entry[1] for entry in row]
        logprobs[number, : len(row)] = [-np.inf if entry[0] is None else entry[0] for entry in row]
    return ids, logprobs


def _first(client: ServerClient, *paths: str) -> dict[str, Any]:
    """The answer at the first of these paths that is there; older servers have other ones."""
    for path in paths[:-1]:
        if (answered := client.send(path)).status == 200:
            return json_object(answered.body)
    return client.ask(paths[-1], json_object)
