"""llama.cpp as a runtime, by the functions of its C interface in the compiled module of `xllamacpp`.

What xllamacpp offers in Python is llama.cpp's server, whose completions have the log-probabilities of one position at a
time, as JSON of the vocabulary. `llama_decode` gives the logits of all positions of a sequence at once.

Settings that are passed to llama.cpp by value get new members from version to version. Those that are set here are
found by their defaults, and what it made of them is asked for afterwards: a version whose settings are not recognised
is refused, never guessed.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....errors import ExportError
from ...runtime import Floats

_ROOM = 1024  # bytes: more than the settings of any version have
_DEFAULT_CONTEXT, _DEFAULT_BATCH = 512, 2048
_F16, _F32 = 1, 0  # of ggml_type
_NO_FLASH = 0
_ERROR = 4  # of ggml_log_level
_MOST_TOKENS = 512  # of a call
_MOST_LOGITS = 2**25  # numbers, of a call

_pointer, _int32 = ctypes.c_void_p, ctypes.c_int32
_LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, _pointer)


class _Settings(ctypes.Structure):
    """llama_context_params or llama_model_params, of some version."""

    _fields_ = [("words", _int32 * (_ROOM // 4))]


class _Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [
        ("count", _int32), ("tokens", _pointer), ("embeddings", _pointer), ("positions", _pointer),
        ("sequence_counts", _pointer), ("sequences", _pointer), ("outputs", _pointer),
    ]  # fmt: skip


_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_quantize_chunk": (
        ctypes.c_size_t, [ctypes.c_int, _pointer, _pointer, *[ctypes.c_int64] * 3, _pointer],
    ),
    "llama_backend_init": (None, []),
    "llama_batch_init": (_Batch, [_int32, _int32, _int32]),
    "llama_batch_free": (None, [_Batch]),
    "llama_context_default_params": (_Settings, []),
    "llama_decode": (_int32, [_pointer, _Batch]),
    "llama_free": (None, [_pointer]),
    "llama_get_logits": (_pointer, [_pointer]),
    "llama_get_memory": (_pointer, [_pointer]),
    "llama_init_from_model": (_pointer, [_pointer, _Settings]),
    "llama_log_get": (None, [_pointer, _pointer]),
    "llama_log_set": (None, [_pointer, _pointer]),
    "llama_memory_clear": (None, [_pointer, ctypes.c_bool]),
    "llama_model_default_params": (_Settings, []),
    "llama_model_free": (None, [_pointer]),
    "llama_model_get_vocab": (_pointer, [_pointer]),
    "llama_model_load_from_file": (_pointer, [ctypes.c_char_p, _Settings]),
    "llama_n_batch": (ctypes.c_uint32, [_pointer]),
    "llama_n_ctx": (ctypes.c_uint32, [_pointer]),
    "llama_n_ubatch": (ctypes.c_uint32, [_pointer]),
    "llama_set_n_threads": (None, [_pointer, _int32, _int32]),
    "llama_tokenize": (
        _int32, [_pointer, ctypes.c_char_p, _int32, _pointer, _int32, ctypes.c_bool, ctypes.c_bool],
    ),
    "llama_vocab_n_tokens": (_int32, [_pointer]),
}  # fmt: skip


@cache
def _library() -> Any:
    """The functions of llama.cpp. ExportError if this build of xllamacpp does not have them."""
    import xllamacpp

    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    for name, (result, arguments) in _FUNCTIONS.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise _refused(f"it does not export {name}") from error
        function.restype, function.argtypes = result, arguments
    library.llama_backend_init()
    batch = library.llama_batch_init(1, 0, 1)
    pointers = (batch.tokens, batch.positions, batch.sequence_counts, batch.sequences, batch.outputs)
    if batch.count or batch.embeddings or not all(pointers):
        raise _refused("its batches have other members")
    library.llama_batch_free(batch)
    return library


def _refused(why: str) -> ExportError:
    return ExportError(
        f"xllamacpp: got version {version('xllamacpp')}, whose llama.cpp cannot be called here, as {why}; expected one "
        "like 2026.10.11549. Install that."
    )


def _context_settings(library: Any, context: int, batch: int, *, exact: bool) -> _Settings:
    """Settings of a context of `context` positions, of which up to `batch` are computed at once.

    exact: keys and values in float32, and attention that does not round them to float16, as it does by default.
    """
    settings = library.llama_context_default_params()
    words = settings.words
    known = list(words)
    types = [n for n in range(8, 40, 2) if known[n : n + 2] == [_F16, _F16]]  # of keys and of values
    kinds = [n for n in range(4, 24) if known[n : n + 4] == [-1] * 4]  # of scaling, pooling, attention, flash attention
    if known[:4] != [_DEFAULT_CONTEXT, _DEFAULT_BATCH, _DEFAULT_CONTEXT, 1] or len(types) != 1 or len(kinds) != 1:
        raise _refused("its settings have other members")
    words[0], words[1], words[2] = context, batch, batch
    if exact:
        words[types[0]] = words[types[0] + 1] = _F32
        words[kinds[0] + 3] = _NO_FLASH
    return settings  # type: ignore[no-any-return]


def quantize_rows(weight: Floats, kind: int, sizes: tuple[int, int]) -> NDArray[np.uint8]:
    """A weight `[O, I]` in a type of ggml. sizes: values and bytes of a block."""
    rows, inputs = weight.shape
    weight = np.ascontiguousarray(weight, np.float32)
    found = np.empty((rows, inputs // sizes[0] * sizes[1]), np.uint8)
    size = _library().ggml_quantize_chunk(kind, weight.ctypes.data, found.ctypes.data, 0, rows, inputs, None)
    if size != found.nbytes:
        raise _refused(f"it made {size} bytes of a weight; expected {found.nbytes}")
    return found


class LlamaCpp:
    """See `Runtime`. path: a GGUF file. exact: attention in float32, instead of llama.cpp's default.

    Raises ExportError if llama.cpp cannot load it.
    """

    def __init__(self, path: Path, threads: int, *, exact: bool = False) -> None:
        self._library = _library()
        self.name = f"llama.cpp (xllamacpp {version('xllamacpp')})"
        self._threads, self._exact = threads, exact
        self._context, self._positions = None, 0
        self._next = 0
        self._sequence: list[int] = []
        with self._messages() as said:
            self._model = self._library.llama_model_load_from_file(
                str(path).encode(), self._library.llama_model_default_params()
            )
        if not self._model:
            raise ExportError(f"{path}: llama.cpp cannot load it ({' '.join(said) or 'it does not say why'}).")
        self._vocab = self._library.llama_model_get_vocab(self._model)
        self._width = int(self._library.llama_vocab_n_tokens(self._vocab))
        self._batch = max(1, min(_MOST_TOKENS, _MOST_LOGITS // self._width))

    def logits(self, inputs: NDArray[Any]) -> Floats:
        found = np.empty((*inputs.shape, self._width), np.float32)
        for ids, logits in zip(inputs, found, strict=True):
            self._begin(len(ids))
            for first in range(0, len(ids), self._batch):
                part = slice(first, first + self._batch)
                logits[part] = self._run(ids[part], every=True)
        return found

    def prefill(self, ids: NDArray[np.int64]) -> Floats:
        self._begin(ids.shape[1] + _MOST_TOKENS)
        self._sequence = ids[0].tolist()
        for first in range(0, ids.shape[1], self._batch):
            logits_1V = self._run(ids[0, first : first + self._batch], every=False)
        return logits_1V.reshape(-1)

    def decode(self, token: int) -> Floats:
        self._sequence.append(token)
        if self._next == self._positions:  # begun again, with more room
            return self.prefill(np.array([self._sequence], np.int64))
        return self._run(np.array([token]), every=False).reshape(-1)

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text with special tokens, both those in it and those that the tokenizer adds."""
        raw = text.encode()
        ids = np.empty(len(raw) + 8, np.int32)
        count = self._library.llama_tokenize(self._vocab, raw, len(raw), ids.ctypes.data, len(ids), True, True)
        return [int(number) for number in ids[:count]]

    def close(self) -> None:
        with self._messages():
            if self._context:
                self._library.llama_free(self._context)
            if self._model:
                self._library.llama_model_free(self._model)
        self._context = self._model = None

    def _begin(self, positions: int) -> None:
        """An empty context of at least this many positions."""
        self._next = 0
        if self._context and self._positions >= positions:
            self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
            return
        self._positions = max(_MOST_TOKENS, 2 ** (positions - 1).bit_length())
        with self._messages() as said:
            if self._context:
                self._library.llama_free(self._context)
            self._context = self._library.llama_init_from_model(
                self._model, _context_settings(self._library, self._positions, self._batch, exact=self._exact)
            )
            if self._context:
                self._library.llama_set_n_threads(self._context, self._threads, self._threads)
        if not self._context:
            raise ExportError(f"llama.cpp: it has no context of {self._positions} positions ({' '.join(said)}).")
        made = [getattr(self._library, f"llama_n_{name}")(self._context) for name in ("ctx", "batch", "ubatch")]
        if made[0] < self._positions or made[1:] != [self._batch, self._batch]:
            raise _refused(f"it made {made} of a context of {self._positions} and batches of {self._batch}")

    def _run(self, ids: NDArray[Any], *, every: bool) -> Floats:
        """Append tokens to the sequence; the logits `[n, V]` after each, or `[1, V]` after the last."""
        count = len(ids)
        tokens = np.ascontiguousarray(ids, np.int32)
        if tokens.min() < 0 or tokens.max() >= self._width:
            raise ExportError(f"llama.cpp: got tokens up to {tokens.max()}; expected 0 to {self._width - 1}.")
        positions = np.arange(self._next, self._next + count, dtype=np.int32)
        ones, sequence = np.ones(count, np.int32), np.zeros(1, np.int32)
        sequences = np.full(count, sequence.ctypes.data, np.uintp)
        outputs = np.full(count, every, np.int8)
        outputs[-1] = 1
        batch = _Batch(
            count, tokens.ctypes.data, None, positions.ctypes.data, ones.ctypes.data, sequences.ctypes.data,
            outputs.ctypes.data,
        )  # fmt: skip
        if (status := self._library.llama_decode(self._context, batch)) != 0:
            raise ExportError(f"llama.cpp: got status {status} at position {self._next}, {count} tokens; expected 0.")
        self._next += count
        rows = count if every else 1
        found = self._library.llama_get_logits(self._context)
        array = np.ctypeslib.as_array(ctypes.cast(found, ctypes.POINTER(ctypes.c_float)), (rows, self._width))
        return array.copy()

    @contextmanager
    def _messages(self) -> Iterator[list[str]]:
        """llama.cpp prints nothing meanwhile; its errors are collected."""
        said: list[str] = []
        previous, data = ctypes.c_void_p(), ctypes.c_void_p()
        self._library.llama_log_get(ctypes.byref(previous), ctypes.byref(data))

        def listen(level: int, text: bytes, _: Any) -> None:
            if level == _ERROR:
                said.append(text.decode(errors="replace").strip())

        callback = _LogCallback(listen)
        self._library.llama_log_set(ctypes.cast(callback, _pointer), None)
        try:
            yield said
        finally:
            self._library.llama_log_set(previous, data)
