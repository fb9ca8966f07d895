"""What a server of a kind is asked, and what its answers mean: the interface, and what the kinds share."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .client import BadAnswer, ServerClient

OUT_OF_VOCABULARY = 2**31 - 1  # a token id that no model has
TOKENIZE = "/tokenize"  # where token ids of a text are asked for, on all kinds
ENTRY_BYTES = 256  # of an answer, for each entry, at most
UNUSED = -9999.0  # and below: how servers write log 0, which JSON lacks


class Entries(NamedTuple):
    """The entries of L positions. ids: int32 `[L, K]`; logprobs: float32 `[L, K]`, −inf where unused."""

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]


@dataclass(frozen=True)
class Served:
    """What a server says about itself and its model.

    engine: its name and version. model: the name that it serves the model under. root: what the model was loaded from.
    max_length: tokens of a prompt and its continuation, at most. vocab_size: the width of its logits. max_k: entries a
    position, at most. None where it does not say. version: of weights that were changed while it served.
    """

    engine: str
    model: str
    root: str = ""
    max_length: int | None = None
    vocab_size: int | None = None
    max_k: int | None = None
    version: str = ""


class Api(Protocol):
    """A kind of server: a module of this folder."""

    PATH: str
    """Where log-probabilities are asked for."""
    MAX_K_IS: str
    """What limits the entries, and what to do about it."""

    def describe(self, client: ServerClient, model: dict[str, Any]) -> Served:
        """What the server says. model: its entry in /v1/models."""
        ...

    def request(self, served: Served, tokens: list[int], k: int) -> bytes:
        """The body that asks for the k most likely tokens after each token of a prompt but the last, which is there to
        be predicted: so all positions of a text are asked for in one way."""
        ...

    def parse(self, body: bytes, length: int, k: int) -> Entries:
        """The entries of the first `length` positions of a prompt with one token more. BadAnswer if they are not all
        there."""
        ...


def whole_number(value: Any) -> int | None:
    """The value if it is a positive integer."""
    return value if type(value) is int and value > 0 else None


def json_object(body: bytes) -> dict[str, Any]:
    """A body as a JSON object. BadAnswer if it is none."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadAnswer(f"a body that is no JSON: {str(error)[:80]}") from error
    if not isinstance(found, dict):
        raise BadAnswer(f"a body with a {type(found).__name__}; expected a JSON object")
    return found


def limit_in_refusal(client: ServerClient, path: str, body: Any, pattern: re.Pattern[str]) -> int | None:
    """The number that a server names when it refuses this request, which no server grants; None if it names none."""
    answered = client.send(path, to_json(body))
    found = pattern.search(client.message(answered)) if answered.status == 400 else None
    return int(found[1]) if found else None


def tokenize_request(served: Served, text: str) -> bytes:
    """The body that asks `TOKENIZE` for the token ids of a text, without special tokens."""
    return to_json({"model": served.model, "prompt": text, "add_special_tokens": False})


def token_ids(body: bytes) -> list[int]:
    """The token ids in an answer to /tokenize."""
    found = json_object(body).get("tokens")
    if not isinstance(found, list) or not all(type(one) is int for one in found):
        raise BadAnswer("an answer without token ids")
    return found


def to_json(value: Any) -> bytes:
    """JSON of a request."""
    return json.dumps(value, separators=(",", ":")).encode()


def decoder(kind: Any) -> Callable[[bytes], Any]:
    """From a body to an instance of a msgspec type, of which only the named fields are made. BadAnswer for another."""
    import msgspec

    made = msgspec.json.Decoder(kind)

    def decode(body: bytes) -> Any:
        try:
            return made.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BadAnswer(f"a body that cannot be read: {str(error)[:120]}") from error

    return decode


def check_count(positions: int, expected: int) -> None:
    """BadAnswer if a server returned other positions than were asked for."""
    if positions != expected:
        raise BadAnswer(
            f"log-probabilities of {positions} positions; expected {expected}, one for each token that was sent (a "
            "proxy may cut prompts, and so may the server if it was started to truncate them)"
        )
