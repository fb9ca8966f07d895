"""A model behind a server as a teacher: `TopK` of each position, asked for in many requests at a time."""

import copy
import hashlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from functools import cached_property, partial
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import TeacherError
from ...models.protocol import TopK
from ...models.tokenizers import Tokenizer
from ...utils.numbers import size_text
from .apis import ENTRY_BYTES, TOKENIZE, Entries, Served, token_ids, tokenize_request
from .client import ServerClient
from .kinds import find_api
from .options import ServerOptions

_PROBE_TOKENS, _PROBE_K = 24, 16
_SAME = 0.1  # nats a position, on average, up to which two probes are of one model
_LOST = 3.0  # nats, of a token that is not among the likely ones any more
_TEXTS = ("A quick brown fox; 0123456789", "Straße, naïve café — 東京 🙂\n\n\tx = {'a': [1, 2]}  # ok")
_POSITIONS_A_REQUEST = 4096  # in flight, for each request at a time
_MOST_IN_FLIGHT = 2**18  # positions
DEFAULTS = ServerOptions()


class ServerTeacher:
    """A `Teacher` that asks a server of vLLM or SGLang for the likeliest tokens and their log-probabilities at T = 1.

    url: http(s)://host:port. options: see `ServerOptions`. device: of the answers. Nothing is asked before something is
    to be known. Raises TeacherError where the server refuses or is not there, and TeacherUnavailable (which is one) for
    a request that keeps failing.
    """

    tail_temperatures = (1.0,)

    def __init__(
        self, url: str, options: ServerOptions = DEFAULTS, *, device: str | torch.device = "cpu", **client: Any
    ) -> None:
        self.device = torch.device(device)
        self._options = options
        self.client = ServerClient(url, options, **client)
        self.notes: list[str] = []
        self._k: int | None = None
        self._begun = time.monotonic()
        self._absences = 0
        self._asked_again: Future[Entries] | None = None

    @cached_property
    def _found(self) -> tuple[Any, Served]:
        return find_api(self.client, self._options)

    @property
    def served(self) -> Served:
        """What the server says about itself."""
        return self._found[1]

    @property
    def name(self) -> str:
        """The name that the server has for its model."""
        return self.served.model

    @property
    def vocab_size(self) -> int:
        """The width of the model's logits. TeacherError if the server does not say it."""
        if (found := self._options.vocab_size or self.served.vocab_size) is None:
            raise TeacherError(
                f"{self.client.shown}: the server does not say how many logits its model has; expected the number, as "
                "vocab_size in the model's config.json: --teacher-options vocab_size=NUMBER."
            )
        return found

    @property
    def max_k(self) -> int:
        """The most entries that the server returns."""
        limit = self.served.max_k
        return self.vocab_size if limit is None else min(limit, self.vocab_size)

    @property
    def max_k_is(self) -> str:
        """What limits them."""
        text: str = self._found[0].MAX_K_IS
        return text

    @property
    def max_positions(self) -> int | None:
        """The longest input: a request has one token more, and continues by one."""
        return None if self.served.max_length is None else max(1, self.served.max_length - 2)

    @property
    def in_flight(self) -> int:
        """Positions that are asked for at a time."""
        return min(self._options.concurrency * _POSITIONS_A_REQUEST, _MOST_IN_FLIGHT)

    def for_targets(self, settings: Any) -> "ServerTeacher":
        """The teacher whose answers have the entries that the settings keep."""
        teacher = copy.copy(self)
        teacher._k = max(1, min(settings.k, self.max_k))
        return teacher

    @cached_property
    def _probe(self) -> list[dict[str, float]]:
        return _rows(self._ask_probe(threading.Event()).result())

    def _ask_probe(self, stop: threading.Event) -> Future[Entries]:
        tokens = [(7919 * i * i + 104729 * i) % self.vocab_size for i in range(_PROBE_TOKENS)]
        return self._ask(tokens, min(_PROBE_K, self.max_k), stop)

    def probe(self) -> list[dict[str, float]]:
        """What it says on fixed tokens: for each, the log-probabilities of the likely next ones, by id."""
        return self._probe

    def compare_probe(self, value: Any) -> str:
        """In a sentence, what makes a probe one of another model; "" if it is this model's, as far as one can tell, and
        then it is taken as its own: batches and hardware change the last digits."""
        try:
            mean = _difference(value, self._probe)
        except (AttributeError, TypeError, ValueError):
            return "its record of the teacher cannot be read"
        if mean <= _SAME:
            self._probe = value
            self.__dict__.pop("fingerprint", None)
            return ""
        return (
            f"the server's model is another one: its log-probabilities of {len(value)} tokens differ by {mean:.2g} "
            f"nats on average from those that the cache was begun with; expected at most {_SAME:g}"
        )

    def check_returned(self, stop: threading.Event, timeout: float | None) -> None:
        """If the server was away for a while: TeacherError if another model came back. TimeoutError if it has not
        answered within the seconds."""
        if self._asked_again is None:
            if "_probe" not in self.__dict__ or self._absences == self.client.absences:
                return
            self._absences, self._asked_again = self.client.absences, self._ask_probe(stop)
        asked = self._asked_again
        if wait([asked], timeout).not_done:
            raise TimeoutError
        self._asked_again = None
        try:
            mean = _difference(self._probe, _rows(asked.result()))
        except BaseException:
            self._absences = -1  # it is asked again
            raise
        if mean > _SAME:
            raise TeacherError(
                f"{self.client.shown}: the server was away and came back with another model: its log-probabilities of "
                f"{_PROBE_TOKENS} tokens differ by {mean:.2g} nats on average from those before; expected at most "
                f"{_SAME:g}. Start it with the model that it had, and run the same command again."
            )

    @cached_property
    def fingerprint(self) -> str:
        """Name, engine, and a hash of what it says on fixed tokens."""
        served = self.served
        root = PurePath(served.root).name if served.root.startswith(("/", "~", ".")) else served.root
        parts = [served.model, f"served by {served.engine}"]
        parts += [f"model {root}"] * bool(root and root != served.model)
        parts += [f"weights {served.version}"] * bool(served.version)
        said = json.dumps([sorted((k, round(v, 2)) for k, v in row.items()) for row in self._probe])
        return ", ".join([*parts, f"probe {hashlib.sha256(said.encode()).hexdigest()[:16]}"])

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """TeacherError if the server's tokenizer gives other ids to some texts; a note if it does not say."""
        served = self.served
        for text in _TEXTS:
            body = tokenize_request(served, text)
            answered = self.client.send(TOKENIZE, body)
            if answered.status in (404, 405, 501):
                self.notes.append(
                    f"the server has no {TOKENIZE}, so its tokenizer was not compared with {tokenizer.name}: make sure "
                    "that both give the same ids."
                )
                return
            theirs = self.client.ask(TOKENIZE, token_ids, body)
            if (ours := tokenizer.encode_chat(text)) != theirs:
                at = next(
                    (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
                    min(len(ours), len(theirs)),
                )
                raise TeacherError(
                    f"tokenizer: got {tokenizer.name}, which gives {text[:12]!r}… the ids {ours[at : at + 4]} from the "
                    f"{at + 1}. on; expected those of the server's, {theirs[at : at + 4]}. Name the tokenizer of its "
                    f"model ({served.root or served.model}), or use --allow-other-tokenizer."
                )

    def __call__(self, inputs: Tensor, lengths: Sequence[int] | None = None) -> TopK:
        """inputs: token ids, int64 `[B, L]`, padded at the end; all of them are asked for, unless lengths are given."""
        return self.submit(inputs, [inputs.shape[1]] * len(inputs) if lengths is None else lengths).result()

    def submit(self, inputs: Tensor, lengths: Sequence[int]) -> "BegunBatch":
        """Begin to answer a batch: a request for each row."""
        rows = inputs.tolist()
        k = self._k or max(1, min(_PROBE_K, self.max_k))
        longest = self.max_positions
        for length in lengths:
            if longest is not None and length > longest:
                raise TeacherError(
                    f"{self.client.shown}: got {length} tokens; expected at most {longest}, as the server takes "
                    f"{longest + 2} with one that is added and one that is generated. Use a smaller --context, or "
                    "start the server with a longer one."
                )
        stop = threading.Event()
        asked = [self._ask(tokens[:length], k, stop) for tokens, length in zip(rows, lengths, strict=True)]
        return BegunBatch(asked, stop, inputs.shape[1], k, self.device, partial(self.check_returned, stop))

    def figures(self) -> dict[str, tuple[float, str]]:
        """Requests and tokens in flight, and retries so far."""
        requests, tokens = self.client.in_flight
        retries = int(self.client.figures["retries"])
        found = {"tokens_in_flight": (float(tokens), f"{tokens:,} tokens in flight in {requests} requests")}
        return found | ({"retries": (float(retries), f"{retries:,} retries")} if retries else {})

    def summary(self) -> str:
        """What was asked, and what parsing took."""
        figures, seconds = self.client.figures, time.monotonic() - self._begun
        return (
            f"{self.client.shown}: {int(figures['requests']):,} requests, {int(figures['retries']):,} of them "
            f"repeated; {size_text(figures['bytes'])} of answers, parsed in {figures['parse_seconds']:.2f} of "
            f"{seconds:.0f} s"
        )

    def _ask(self, tokens: list[int], k: int, stop: threading.Event) -> Future[Entries]:
        api, served = self._found
        length = len(tokens)
        return self.client.submit(
            api.PATH,
            lambda body: api.parse(body, length, k),
            # one token more: what follows the last one is asked for as all others are
            lambda: api.request(served, [*tokens, tokens[0]], k),
            tokens=length,
            limit=(length + 2) * (k + 1) * ENTRY_BYTES + 2**20,
            stop=stop,
        )


def _rows(entries: Entries) -> list[dict[str, float]]:
    """Of each position, the log-probabilities by id."""
    return [
        {str(token): round(float(logprob), 4) for token, logprob in zip(*row, strict=True) if logprob > -np.inf}
        for row in zip(entries.ids, entries.logprobs, strict=True)
    ]


def _difference(before: Any, now: list[dict[str, float]]) -> float:
    """By how many nats the log-probability of each position's likeliest token has changed, on average."""
    best = [max(row.items(), key=lambda entry: entry[1]) for row in before]
    lost = [abs(row.get(token, logprob - _LOST) - logprob) for (token, logprob), row in zip(best, now, strict=True)]
    return float(np.mean(lost))


class BegunBatch:
    """The requests of a batch; see `teachers.protocol.Begun`."""

    def __init__(
        self,
        rows: list[Future[Entries]],
        stop: threading.Event,
        length: int,
        k: int,
        device: torch.device,
        check: Callable[[float | None], None],
    ) -> None:
        self._check = check
        self._rows, self._stop, self._shape, self._device = rows, stop, (len(rows), length, k), device

    def result(self, timeout: float | None = None) -> TopK:
        """See `Begun`."""
        done, waiting = wait(self._rows, timeout, FIRST_EXCEPTION)
        failed = [row for row, future in enumerate(self._rows) if future in done and future.exception() is not None]
        if failed:
            error = self._rows[failed[0]].exception()
            assert error is not None
            error.row = failed[0]  # type: ignore[attr-defined]
            self.cancel()
            raise error
        if waiting:
            raise TimeoutError
        self._check(timeout)
        ids = np.zeros(self._shape, np.int64)
        logprobs = np.full(self._shape, -np.inf, np.float32)
        for row, future in enumerate(self._rows):
            entries = future.result()
            length, width = entries.ids.shape
            ids[row, :length, :width], logprobs[row, :length, :width] = entries
        return TopK(torch.from_numpy(ids).to(self._device), torch.from_numpy(logprobs).to(self._device))

    def cancel(self) -> None:
        """See `Begun`."""
        self._stop.set()
        for future in self._rows:
            future.cancel()
