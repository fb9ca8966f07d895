"""Tokenizers of transformers, with fingerprints: text and conversations to token ids.

tokenizer = load_tokenizer("HuggingFaceTB/SmolLM2-135M-Instruct")
docs = load_documents("chats.jsonl", tokenizer=tokenizer, loss_on="assistant", vocab_size=teacher.vocab_size)
"""

import ctypes
import hashlib
import json
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ..cache.errors import type_name
from ..errors import DataError, TeacherError
from .hub import brief, load_transformers, resolve

TODAY = datetime(2024, 7, 26)
"""The date that chat templates see: a conversation must give the same tokens every day."""
_CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
TEMPLATE_SECONDS = 10.0  # for one conversation
_PROBE = "A quick brown fox; 0123456789"


class Tokenizer:
    """Text to token ids; made by `load_tokenizer`. Not thread-safe.

    name: for people. Special tokens in a text, such as `<|im_end|>`, become their ids.
    """

    def __init__(self, backend: Any, *, name: str, append_eos: bool = True, template: str | Path | None = None) -> None:
        self.name = name
        self._backend = backend
        self._template_file = template
        self._end: int | None = backend.eos_token_id if append_eos else None

    @property
    def backend(self) -> Any:
        """The tokenizer of transformers."""
        return self._backend

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest token id."""
        return int(max(self._backend.get_vocab().values())) + 1

    def encode(self, text: str) -> list[int]:
        """The token ids of a document, with the special tokens that the tokenizer adds, and its eos_token at the end
        unless there already. An empty text has no ids."""
        if not text:
            return []
        ids = list(self._backend(text, verbose=False)["input_ids"])
        return [*ids, self._end] if self._end is not None and ids[-1:] != [self._end] else ids

    def encode_chat(self, text: str) -> list[int]:
        """The token ids of a conversation as text, which already contains its special tokens."""
        return list(self._backend(text, add_special_tokens=False, verbose=False)["input_ids"])

    def encode_completion(self, prompt: str, completion: str) -> tuple[list[int], int]:
        """The token ids of a document in two parts, each tokenized by itself, and the number of the first one's."""
        first = list(self._backend(prompt, verbose=False)["input_ids"]) if prompt else []
        if first and first[-1] == self._backend.eos_token_id:  # of tokenizers that add it to every text
            del first[-1]
        # an empty prompt still begins as a document does
        rest = self.encode_chat(completion) if prompt else self.encode(completion)
        end = [] if self._end is None or rest[-1:] == [self._end] else [self._end]
        return [*first, *rest, *(end if first or rest else [])], len(first)

    def template(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """A conversation as text, by the chat template. DataError if there is none, or if it takes too long."""
        with _time_limit(TEMPLATE_SECONDS, "the chat template"):
            text: str = self._backend.apply_chat_template(
                list(messages),
                chat_template=self.template_text,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        return text

    @cached_property
    def template_text(self) -> str:
        """The chat template, with calls for the date replaced by 26 July 2024. DataError if there is none."""
        if self._template_file is not None:
            try:
                if not Path(self._template_file).is_file():
                    raise FileNotFoundError("there is no such file")  # a pipe would be waited for
                text = Path(self._template_file).read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise DataError(f"template {self._template_file}: cannot be read ({brief(error)}).") from error
        else:
            try:
                text = self._backend.get_chat_template()
            except ValueError as error:
                raise DataError(
                    f"tokenizer {self.name}: it has no default chat template, which turns messages into text. Give one "
                    "in a file (--template), or a column of text."
                ) from error
        text = _CLOCK.sub(lambda found: json.dumps(TODAY.strftime(found[2])), text)
        if re.search(r"strftime_now\s*\(", text):
            raise DataError(
                f"tokenizer {self.name}: its chat template uses the current date in a way that cannot be replaced, so "
                "conversations would give other tokens tomorrow. Give one without the date in a file (--template)."
            )
        return text

    def save(self, folder: Path) -> None:
        """Write its files into a folder, for `AutoTokenizer.from_pretrained`."""
        self._backend.save_pretrained(folder)

    @cached_property
    def identity(self) -> str:
        """sha256 of the tokenizer and its special tokens; independent of its folder and of append_eos."""
        special = self._backend.special_tokens_map
        return hashlib.sha256(json.dumps([_contents(self._backend), special], sort_keys=True).encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """Everything that decides the ids of a document, as one line."""
        end = f"{self._backend.eos_token} ({self._end})" if self._end is not None else "nothing"
        return f"sha256 {self.identity}, documents end with {end}"

    @cached_property
    def template_fingerprint(self) -> str:
        """sha256 of the chat template."""
        return f"sha256 {hashlib.sha256(self.template_text.encode()).hexdigest()}"


def load_tokenizer(
    source: Any,
    *,
    append_eos: bool = True,
    template: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Tokenizer:
    """Load a tokenizer.

    source: a folder, a GGUF file, a name on the Hugging Face Hub, or a tokenizer of transformers.
    append_eos: whether plain documents end with its eos_token.
    template: a file with a chat template (Jinja), instead of its own.
    Raises TeacherError if there is none.
    """
    if not isinstance(source, (str, Path)):
        if not callable(source) or not hasattr(source, "get_vocab"):
            raise TeacherError(f"tokenizer: got {type_name(source)}; expected a name or a transformers tokenizer.")
        name = Path(getattr(source, "name_or_path", "") or type(source).__name__).name
        return Tokenizer(source, name=name, append_eos=append_eos, template=template)
    transformers = load_transformers()
    files = resolve(source, revision)
    try:
        backend = transformers.AutoTokenizer.from_pretrained(
            files.folder, trust_remote_code=trust_remote_code, **files.arguments
        )
    except Exception as error:
        raise TeacherError(
            f"{source}: transformers finds no tokenizer there ({brief(error)}). Name one (--tokenizer)."
        ) from error
    # for a folder without one, transformers returns an empty tokenizer, which gives no ids
    if not set(backend(_PROBE)["input_ids"]) - set(backend.all_special_ids):
        raise TeacherError(f"{source}: got a folder without the files of a tokenizer. Name one (--tokenizer).")
    return Tokenizer(backend, name=files.name, append_eos=append_eos, template=template)


class _TimeUp(BaseException):
    """Raised in a thread by another one. No library takes it for an error of its own."""


@contextmanager
def _time_limit(seconds: float, what: str) -> Iterator[None]:
    """DataError if Python code computes for longer, on any thread: a template may loop for ever. Time in which the
    thread waits for others does not count."""
    thread, lock, over = threading.get_ident(), threading.Lock(), False
    now: Callable[[], float] = time.monotonic
    if hasattr(time, "pthread_getcpuclockid"):  # not on macOS
        now = partial(time.clock_gettime, time.pthread_getcpuclockid(thread))
    end = now() + seconds
    timers: list[threading.Timer] = []

    def watch() -> None:
        with lock:
            if over:
                return
            if (left := end - now()) <= 0:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_TimeUp))
                return
            timers.append(threading.Timer(left, watch))
            timers[-1].daemon = True
            timers[-1].start()

    watch()
    try:
        yield
    except _TimeUp as error:
        raise DataError(f"{what} took longer than {seconds:g} s. Give another one, or a column of text.") from error
    finally:
        with lock:
            over = True
            # if it was about to be raised
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None)
        timers[-1].cancel()


def choose_tokenizer(
    named: Tokenizer | None, own: Tokenizer | None, *, allow_other_tokenizer: bool = False
) -> Tokenizer | None:
    """The named tokenizer, or else the teacher's own.

    DataError if they differ, unless that is allowed: the ids of another tokenizer mean other tokens to the teacher.
    """
    if named is None or own is None:
        return named or own
    if named.identity != own.identity and not allow_other_tokenizer:
        raise DataError(
            f"tokenizer: got {named.name} (sha256 {named.identity[:12]}…); expected the teacher's, {own.name} (sha256 "
            f"{own.identity[:12]}…). Leave it out to use the teacher's; or, if both give the same ids, use "
            "--allow-other-tokenizer."
        )
    return named


def _contents(backend: Any) -> Any:
    """The contents of a tokenizer that decide its ids."""
    rust = getattr(backend, "backend_tokenizer", None)
    if rust is not None:
        parts = json.loads(rust.to_str())
        # set by its last call
        return {key: value for key, value in parts.items() if key not in ("truncation", "padding")}
    with tempfile.TemporaryDirectory() as folder:
        backend.save_vocabulary(folder)
        files = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).iterdir())]
    return [type(backend).__name__, files, sorted(backend.get_added_vocab().items())]
