"""The tokenizer of a student as GGUF stores it: tokens, their types, merges or scores, special tokens, chat template.

Two kinds of tokenizer.json can be written: BPE over bytes (GPT-2, Llama 3, Qwen, SmolLM), whose splitting of a text
into words llama.cpp knows by a name; and BPE over characters that falls back to bytes, as of sentencepiece (Llama 2,
Gemma). What is written is compared with the tokenizer on `TEXTS`, in llama.cpp.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ....errors import ExportError, TeacherError
from ....models.tokenizers import load_tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_UNMERGED = -1e6  # of a character, which no merge makes

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
_REST = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}


def _regex(pattern: str) -> list[dict[str, Any]]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, _BYTES | {"use_regex": False}]


_SPLITS: list[tuple[str, bool | None, list[dict[str, Any]]]] = [
    ("gpt-2", None, [_BYTES]),
    ("smollm", None, [_DIGITS, _BYTES]),
    ("llama-bpe", True, _regex(f"{_CONTRACTIONS}\\p{{N}}{{1,3}}{_REST}")),
    ("dbrx", False, _regex(f"{_CONTRACTIONS}\\p{{N}}{{1,3}}{_REST}")),
    ("qwen2", None, _regex(f"{_CONTRACTIONS}\\p{{N}}{_REST}")),
]
"""Names of llama.cpp for ways to split a text before merging; whether a word that is a token is taken without merging
(None: that makes no difference known to llama.cpp); the steps in tokenizer.json."""

TEXTS = (
    "Hello world",
    " a space before, and two  within;\tand a tab",
    "line\nbreaks\r\n\r\nof\n\n\ntwo kinds \n and spaces at the end   ",
    "I'm, you'll, WE'VE, it's; 'quoted' \"text\"",
    "1 22 333 4444 55555, 3.14159e-10, 0xFF, 1,000,000",
    "naïve façade, Straße, 東京タワー, привет мир, עברית, हिन्दी, ไทย",
    "emoji 👍🏽 👩‍👩‍👧 and symbols ∑ ≠ ½ ™",
    "def f(x):\n    return {'a': [x**2 for _ in range(10)]}  # comment\n",
    "<|im_start|>user\nthat is no special token?<|im_end|>",
    "https://example.org/a_b?c=d&e=%20f",
    "\u00a0no-break\u2003em\u200bzero",
)
"""Texts on which llama.cpp must find the tokenizer's ids: none with letters that Unicode would compose."""


@dataclass(frozen=True)
class Vocabulary:
    """kind: llama.cpp's, "gpt2" or "llama", or "none" for a student without a tokenizer. pre: how it splits a text.
    special: ids by role ("bos"). backend: the tokenizer of transformers, None without one."""

    kind: str
    size: int
    tokens: list[str] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    scores: list[float] | None = None
    merges: list[str] | None = None
    pre: str = ""
    special: dict[str, int] = field(default_factory=dict)
    adds: dict[str, bool] = field(default_factory=dict)
    template: str | None = None
    backend: Any = None

    def add_to(self, writer: Any) -> None:
        """Write it. writer: a GGUFWriter."""
        writer.add_tokenizer_model(self.kind)
        if self.kind == "none":
            return
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        for role, token in self.special.items():
            getattr(writer, f"add_{role}_token_id")(token)
        writer.add_add_bos_token(self.adds["bos"])
        writer.add_add_eos_token(self.adds["eos"])
        if self.kind == "llama":
            writer.add_add_space_prefix(self.adds["space"])
        if self.template is not None:
            writer.add_chat_template(self.template)


def read_vocabulary(folder: Path | None, size: int) -> Vocabulary:
    """The tokenizer in a folder, for a model of `size` tokens. Raises ExportError for one that GGUF cannot hold, or
    with more ids than the model has."""
    if folder is None:
        return Vocabulary("none", size)
    try:
        backend = load_tokenizer(folder).backend
    except TeacherError as error:
        raise ExportError(f"tokenizer: {error}") from error
    rust = getattr(backend, "backend_tokenizer", None)
    parts: Any = json.loads(rust.to_str()) if rust is not None else {"model": {"type": type(backend).__name__}}
    model, added = parts["model"], parts.get("added_tokens", [])
    if model["type"] != "BPE":
        raise _cannot(folder, f"a tokenizer of type {model['type']}; expected BPE")
    ids: dict[str, int] = dict(model["vocab"]) | {token["content"]: token["id"] for token in added}
    if (highest := max(ids.values())) >= size:
        raise ExportError(
            f"tokenizer: got ids up to {highest} in {folder}; expected less than {size}, the tokens of the model."
        )
    tokens, types = [f"[PAD{n}]" for n in range(size)], [_UNUSED] * size
    for token, number in ids.items():
        tokens[number], types[number] = token, _NORMAL
    for token in added:
        types[token["id"]] = _CONTROL if token["special"] else _USER
    pairs = [pair if isinstance(pair, list) else pair.split(" ", 1) for pair in model["merges"]]
    text, bare = (list(backend("a", add_special_tokens=special)["input_ids"]) for special in (True, False))
    special = {
        role: int(named)
        for role in ("bos", "eos", "unk", "pad")
        if (named := getattr(backend, f"{role}_token_id", None)) is not None and named < size
    }
    adds = {"bos": text[:1] != bare[:1], "eos": text[-1:] != bare[-1:], "space": tokens[bare[0]].startswith("▁")}
    common = {"special": special, "adds": adds, "template": _template(backend), "backend": backend}
    if not model.get("byte_fallback"):
        merges = [" ".join(pair) for pair in pairs]
        return Vocabulary("gpt2", size, tokens, types, None, merges, _split(folder, parts), **common)
    for token, number in ids.items():
        if len(token) == 6 and token.startswith("<0x"):
            types[number] = _BYTE
    if (unknown := model.get("unk_token")) is not None:
        types[ids[unknown]] = _UNKNOWN
    scores = [_UNMERGED] * size
    for rank, pair in reversed(list(enumerate(pairs))):
        scores[ids["".join(pair)]] = -float(rank)  # the earliest merge that makes it
    return Vocabulary("llama", size, tokens, types, scores, None, "default", **common)


def _split(folder: Path, parts: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer splits a text into words. ExportError if it has none."""
    steps = parts["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    given = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    whole = parts["model"].get("ignore_merges", False)
    for name, words, expected in _SPLITS:
        if given == expected and words in (None, whole):
            return name
    known = ", ".join(name for name, _, _ in _SPLITS)
    raise _cannot(folder, f"a pre-tokenizer that llama.cpp has no name for; expected one of {known}")


def _template(backend: Any) -> str | None:
    template = getattr(backend, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template


def _cannot(folder: Path, what: str) -> ExportError:
    return ExportError(f"tokenizer: got {folder} with {what}, as GGUF can hold. Export it to onnx.")
