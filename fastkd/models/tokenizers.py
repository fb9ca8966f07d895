"""A tokenizer of transformers, with what says which one it is: text and conversations to ids.

tokenizer = load_tokenizer("HuggingFaceTB/SmolLM2-135M-Instruct")
docs = load_documents("chats.jsonl", tokenizer=tokenizer, loss_on="assistant", vocab_size=teacher.vocab_size)
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import DataError, TeacherError
from .hub import brief, load_transformers, resolve

TODAY = datetime(2024, 7, 26)
"""What a chat template is told when it asks for the date: a conversation must not be other tokens tomorrow."""
_CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_PROBE = "A quick brown fox; 0123456789"


class Tokenizer:
    """Text to ids; made by `load_tokenizer`. For one thread at a time.

    name: for people. Special tokens that stand in a text, as `<|im_end|>`, are read as such.
    """

    def __init__(self, backend: Any, *, name: str, append_eos: bool = True, template: str | Path | None = None) -> None:
        self.name = name
        self._backend = backend
        self._append_eos = append_eos
        self._template_file = template
        self._end: int | None = backend.eos_token_id if append_eos else None

    @cached_property
    def vocab_size(self) -> int:
        """Its ids lie below this."""
        return int(max(self._backend.get_vocab().values())) + 1

    def encode(self, text: str) -> list[int]:
        """A document's ids: with the special tokens that this tokenizer adds, and an end-of-document token (its
        eos_token) after them, unless it is there or there is none. Of an empty text: none at all."""
        if not text:
            return []
        ids = list(self._backend(text, verbose=False)["input_ids"])
        return [*ids, self._end] if self._end is not None and ids[-1:] != [self._end] else ids

    def encode_chat(self, text: str) -> list[int]:
        """The ids of what a template made: its special tokens stand in the text."""
        return list(self._backend(text, add_special_tokens=False, verbose=False)["input_ids"])

    def template(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """A conversation as text. DataError where there is no template."""
        text: str = self._backend.apply_chat_template(
            list(messages),
            chat_template=self.template_text,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
        return text

    @cached_property
    def template_text(self) -> str:
        """The chat template; where it asks for the date, it is told 26 July 2024. DataError where there is none."""
        if self._template_file is not None:
            try:
                text = Path(self._template_file).read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise DataError(f"template {self._template_file}: cannot be read ({brief(error)}).") from error
        else:
            try:
                text = self._backend.get_chat_template()
            except ValueError as error:
                raise DataError(
                    f"tokenizer {self.name}: it has no chat template, or none that is the default, to make text of "
                    "messages. Give one in a file (--template), or a column of text."
                ) from error
        text = _CLOCK.sub(lambda found: json.dumps(TODAY.strftime(found[2])), text)
        if re.search(r"strftime_now\s*\(", text):
            raise DataError(
                f"tokenizer {self.name}: its chat template asks for the date in a way that cannot be answered here, so "
                "that conversations would be other tokens tomorrow. Give one without in a file (--template)."
            )
        return text

    def save(self, folder: Path) -> None:
        """Write its files into a folder, for whoever loads a tokenizer of transformers from there."""
        self._backend.save_pretrained(folder)

    @cached_property
    def identity(self) -> str:
        """sha256 of the tokenizer itself and its special tokens; neither of where it lies nor of what is appended."""
        special = self._backend.special_tokens_map
        return hashlib.sha256(json.dumps([_contents(self._backend), special], sort_keys=True).encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """What decides the ids of a document, as one line."""
        end = f"{self._backend.eos_token} ({self._end})" if self._end is not None else "nothing"
        return f"sha256 {self.identity}, documents end with {end}"

    @cached_property
    def template_fingerprint(self) -> str:
        """sha256 of the chat template."""
        return f"sha256 {hashlib.sha256(self.template_text.encode()).hexdigest()}"


def load_tokenizer(
    place: Any,
    *,
    append_eos: bool = True,
    template: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Tokenizer:
    """A tokenizer.

    place: a folder, a GGUF file, a name on the Hugging Face Hub, or a tokenizer of transformers.
    append_eos: whether plain documents end with its eos_token.
    template: a file with a chat template (Jinja), in place of its own.
    Raises TeacherError where there is none.
    """
    if not isinstance(place, (str, Path)):
        if not callable(place) or not hasattr(place, "get_vocab"):
            raise TeacherError(f"tokenizer: got {type(place).__name__}; expected a name or a transformers tokenizer.")
        name = Path(getattr(place, "name_or_path", "") or type(place).__name__).name
        return Tokenizer(place, name=name, append_eos=append_eos, template=template)
    transformers = load_transformers()
    found = resolve(place, revision)
    try:
        backend = transformers.AutoTokenizer.from_pretrained(
            found.folder, trust_remote_code=trust_remote_code, **found.arguments
        )
    except Exception as error:
        raise TeacherError(
            f"{place}: transformers finds no tokenizer there ({brief(error)}). Name the tokenizer apart (--tokenizer)."
        ) from error
    # of a folder without any, transformers makes an empty one, to which every text is nothing
    if not set(backend(_PROBE)["input_ids"]) - set(backend.all_special_ids):
        raise TeacherError(
            f"{place}: no tokenizer's files are there (what is made without them knows no words). Name the tokenizer "
            "apart (--tokenizer)."
        )
    return Tokenizer(backend, name=found.name, append_eos=append_eos, template=template)


def choose_tokenizer(
    named: Tokenizer | None, own: Tokenizer | None, *, allow_other_tokenizer: bool = False
) -> Tokenizer | None:
    """The tokenizer that was named, or else the teacher's own.

    DataError where both are there and differ, unless that is allowed: a teacher is at a loss with another's ids.
    """
    if named is None or own is None:
        return named or own
    if named.identity != own.identity and not allow_other_tokenizer:
        raise DataError(
            f"tokenizer {named.name} (sha256 {named.identity[:12]}…) is not that of the teacher, {own.name} (sha256 "
            f"{own.identity[:12]}…). Leave it out, to take the teacher's; or, if its ids mean the same, allow it "
            "(--allow-other-tokenizer)."
        )
    return named


def _contents(backend: Any) -> Any:
    """All that a tokenizer is made of."""
    rust = getattr(backend, "backend_tokenizer", None)
    if rust is not None:
        parts = json.loads(rust.to_str())
        # how it was last called
        return {key: value for key, value in parts.items() if key not in ("truncation", "padding")}
    with tempfile.TemporaryDirectory() as folder:
        backend.save_vocabulary(folder)
        files = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).iterdir())]
    return [type(backend).__name__, files, sorted(backend.get_added_vocab().items())]
