"""The settings of a cache: one frozen dataclass, written once as spec.json, with its hash in every shard."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

from .errors import CacheError
from .provenance import TEXTS, Provenance
from .values import integer, number, positive

FORMAT = 1
# The features that this version reads. A cache names those that it cannot be read without.
FEATURES = frozenset({"rows", "draws", "ties", "contexts", "pcodec", "zstd"})
RESERVED = frozenset(
    {"ids", "logprobs", "tail", "draws", "outcomes", "sequence_lengths", "document_lengths", "first_sequence"}
)
COMPRESSORS = {"pcodec": 12, "zstd": 19}  # and their highest level
_STEPS = ("step", "cap", "tail_step", "draw_step")
_RANGES = {
    "vocab_size": (1, 2**26), "k": (0, 2**16 - 1), "draws": (0, 2**16 - 1), "shard_positions": (1, 2**31 - 1)
}  # fmt: skip
MOST_COLUMNS = 64  # inputs, and temperatures: the attributes of a shard must fit into its last 64 KiB
LONGEST_TEXT = 2**16  # characters: spec.json stays below the size that readers accept


@dataclass(frozen=True)
class Codec:
    """How targets become bytes. Steps are in nats; see FORMAT.md.

    step, growth, cap: the grid of the top-k entries' log-probabilities, whose step is min(step·e^(growth·x), cap) at a
    log-probability of −x. tail_step, draw_step: the steps of tails and of drawn entries' log-probabilities.
    sort_ties: entries of equal code are sorted by rank, which is smaller; otherwise they keep their order.
    contexts: ids are ranked given the input column `tokens`: smaller still, and slower.
    compressor: "pcodec", or "zstd" for readers that know only the codecs of the Zarr v3 core. level: the compressor's.
    """

    step: float = 1 / 56
    growth: float = 0.3
    cap: float = 0.4
    tail_step: float = 1 / 16
    draw_step: float = 1 / 4
    sort_ties: bool = True
    contexts: bool = False
    compressor: str = "pcodec"
    level: int = 8


CODECS = {
    "fast": Codec(step=1 / 16, growth=0.0, cap=1 / 16, sort_ties=False, level=4),
    "default": Codec(),
    "smallest": Codec(contexts=True),
    "portable": Codec(compressor="zstd", level=9),
}


@dataclass(frozen=True)
class CacheSpec:
    """The settings of a cache, and the fingerprints of what it was captured from.

    vocab_size: the width V of the teacher's output. k: top-k entries of a row, at most. draws: drawn entries of a row,
    at most. draw_temperature: the temperature of the draws. mass: the top-k entries of a row end once their
    probabilities add up to this (None: they do not).
    temperatures: at which tails are stored; ascending, 1.0 among them.
    shard_positions: positions of a shard, at most.
    codec: the name of a setting ("fast", "default", "smallest", "portable") or a `Codec`.
    inputs: the names of the input columns.
    teacher, tokenizer, dataset: fingerprints, free text; `Provenance.texts` makes them. notes: free text that is not
    covered by the hash.

    Raises CacheError for a value that a cache cannot have.
    """

    vocab_size: int
    k: int
    draws: int = 0
    draw_temperature: float = 1.0
    mass: float | None = None
    temperatures: tuple[float, ...] = (1.0, 1.5, 2.0, 4.0)
    shard_positions: int = 2**20
    codec: Codec | str = "default"
    inputs: tuple[str, ...] = ("tokens",)
    teacher: str = ""
    tokenizer: str = ""
    dataset: str = ""
    notes: str = ""

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name in ("temperatures", "inputs"):
            value = getattr(self, name)
            if isinstance(value, (str, set, frozenset)) or not hasattr(value, "__iter__"):
                raise CacheError(f"{name}: got {value!r}; expected a list or a tuple.")
            put(name, tuple(value))
            if len(getattr(self, name)) > MOST_COLUMNS:
                raise CacheError(f"{name}: got {len(getattr(self, name))} values; expected at most {MOST_COLUMNS}.")
        for name, (low, high) in _RANGES.items():
            put(name, integer(name, getattr(self, name), low, high))
        if self.k + self.draws == 0:
            raise CacheError("k: got 0 with draws=0; expected top-k entries, draws or both.")
        put("draw_temperature", positive("draw_temperature", self.draw_temperature))
        put("temperatures", tuple(positive("temperatures", t) for t in self.temperatures))
        if 1.0 not in self.temperatures or list(self.temperatures) != sorted(set(self.temperatures)):
            raise CacheError(f"temperatures: got {self.temperatures}; expected ascending numbers with 1.0 among them.")
        if self.mass is not None:
            put("mass", positive("mass", self.mass))
            if not self.mass <= 1:
                raise CacheError(f"mass: got {self.mass}; expected a probability, up to 1, or None.")
        for name in self.inputs:
            if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,63}", name) or name in RESERVED:
                raise CacheError(
                    f"inputs: got {name!r}; expected a name of letters, digits and _, up to 64, that is not reserved "
                    f"({', '.join(sorted(RESERVED))})."
                )
        if len(set(self.inputs)) != len(self.inputs):
            raise CacheError(f"inputs: got {self.inputs}; expected distinct names.")
        for name in TEXTS:
            text = getattr(self, name)
            if not isinstance(text, str) or len(text) > LONGEST_TEXT:
                shown = repr(text) if not isinstance(text, str) else f"{len(text)} characters"
                raise CacheError(f"{name}: got {shown}; expected text of at most {LONGEST_TEXT} characters.")
        put("codec", _checked(self.codec))
        if self.settings.contexts and "tokens" not in self.inputs:
            raise CacheError(
                'codec: contexts need the input column "tokens"; use another setting, or name that column.'
            )

    @property
    def settings(self) -> Codec:
        """The codec, as a `Codec`."""
        assert isinstance(self.codec, Codec)
        return self.codec

    @property
    def width(self) -> int:
        """K, the columns of a decoded row: top-k entries and draws."""
        return min(self.k, self.vocab_size) + self.draws

    @property
    def required(self) -> tuple[str, ...]:
        """The features without which the shards cannot be read."""
        codec = self.settings
        named = {"rows", codec.compressor}
        named |= {"draws"} if self.draws else set()
        named |= {"ties"} if codec.sort_ties else set()
        named |= {"contexts", "ties"} if codec.contexts else set()
        return tuple(sorted(named))

    @cached_property
    def provenance(self) -> Provenance:
        """The teacher and the data of the cache: what `teacher`, `tokenizer` and `dataset` say, field by field."""
        return Provenance.from_texts(self.teacher, self.tokenizer, self.dataset)

    @property
    def hash(self) -> str:
        """sha256 of all fields but the notes, in hexadecimal. Every shard carries it."""
        return hashlib.sha256(_canonical(asdict(replace(self, notes="")))).hexdigest()

    def to_json(self) -> bytes:
        """spec.json."""
        document = {
            "format": "fastkd-cache",
            "version": FORMAT,
            "required": self.required,
            "optional": ("provenance",),
            "sha256": self.hash,
            "provenance": asdict(self.provenance),
            "spec": asdict(self),
        }
        return json.dumps(document, indent=2, allow_nan=False).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> "CacheSpec":
        """The spec in spec.json. CacheError if it is damaged, of another format, or needs a newer version."""
        document = parse_json(data, "spec.json")
        if document.get("format") != "fastkd-cache":
            raise CacheError("spec.json: this is not the spec of a fastkd cache.")
        if type(document.get("version")) is not int or document["version"] != FORMAT:
            raise CacheError(
                f"spec.json: got format version {document.get('version')!r}; expected {FORMAT}. Use the fastkd that "
                "wrote the cache, or a newer one."
            )
        required = document.get("required")
        if not isinstance(required, list) or not all(isinstance(r, str) for r in required):
            raise CacheError(f"spec.json: required: got {required!r}; expected a list of features.")
        if unknown := sorted(set(required) - FEATURES):
            raise CacheError(
                f"spec.json: got required features {', '.join(unknown)}, unknown to this fastkd. Use a newer one."
            )
        values = document.get("spec")
        if not isinstance(values, dict):
            raise CacheError("spec.json: the member `spec` is missing.")
        given = {**_known(cls, values), "codec": Codec(**_known(Codec, values.get("codec")))}
        try:
            spec = cls(**given)
        except CacheError as error:
            raise CacheError(f"spec.json: {error}") from error
        if not set(spec.required) <= set(required):
            raise CacheError(f"spec.json: required: got {required}; expected {list(spec.required)} for its settings.")
        if spec.hash != document.get("sha256"):
            raise CacheError(
                "spec.json: its hash differs from its contents: the file was changed. Restore it (every shard has the "
                "hash of the original)."
            )
        typed, given = asdict(spec.provenance), document.get("provenance", {})
        if not isinstance(given, dict) or any(given[name] != typed[name] for name in given.keys() & typed.keys()):
            raise CacheError(
                "spec.json: its member `provenance` differs from `teacher`, `tokenizer` and `dataset` in `spec`: the "
                "file was changed. Restore it, or delete that member."
            )
        return spec


def differences(one: CacheSpec, other: CacheSpec) -> list[str]:
    """The fields in which two specs differ, with both values; without notes."""
    return [
        f"{f.name}: {getattr(one, f.name)!r} and {getattr(other, f.name)!r}"
        for f in fields(CacheSpec)
        if f.name != "notes" and getattr(one, f.name) != getattr(other, f.name)
    ]


def parse_json(data: bytes, name: str) -> dict[str, Any]:
    """A JSON object from a file of any content. CacheError, naming the file, if it is none."""
    if len(data) > 2**22:
        raise CacheError(f"{name}: got {len(data)} bytes; expected at most 4 MiB.")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{name}: not readable as JSON ({error}).") from error
    if not isinstance(document, dict):
        raise CacheError(f"{name}: got {type(document).__name__}; expected an object.")
    return document


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _known(cls: type, values: Any) -> dict[str, Any]:
    names = {f.name for f in fields(cls)}
    if not isinstance(values, Mapping) or set(values) != names:
        found = sorted(values) if isinstance(values, Mapping) else values
        raise CacheError(f"spec.json: got {found}; expected {sorted(names)}.")
    return dict(values)


def _checked(codec: Any) -> Codec:
    """The codec that a name or a `Codec` stands for, with Python's own numbers, so that equal codecs have one hash."""
    codec = CODECS.get(codec, codec) if isinstance(codec, str) else codec
    if not isinstance(codec, Codec):
        raise CacheError(f"codec: got {codec!r}; expected one of {', '.join(CODECS)}, or a Codec.")
    numbers: dict[str, Any] = {name: positive(f"codec.{name}", getattr(codec, name)) for name in _STEPS}
    for name, value in numbers.items():
        if not 1e-4 <= value <= 8:
            raise CacheError(f"codec.{name}: got {value}; expected 0.0001 to 8 nats.")
    numbers["growth"] = number("codec.growth", codec.growth) + 0.0  # no −0
    if numbers["growth"] and not 1e-4 <= numbers["growth"] <= 1:
        raise CacheError(f"codec.growth: got {codec.growth!r}; expected 0, or 0.0001 to 1.")
    if numbers["cap"] < numbers["step"]:
        raise CacheError(f"codec.cap: got {codec.cap}; expected at least the step of {codec.step}.")
    for name in ("sort_ties", "contexts"):
        if not isinstance(getattr(codec, name), bool):
            raise CacheError(f"codec.{name}: got {getattr(codec, name)!r}; expected True or False.")
    if codec.compressor not in tuple(COMPRESSORS):
        raise CacheError(f"codec.compressor: got {codec.compressor!r}; expected one of {', '.join(COMPRESSORS)}.")
    return replace(codec, level=integer("codec.level", codec.level, 0, COMPRESSORS[codec.compressor]), **numbers)
