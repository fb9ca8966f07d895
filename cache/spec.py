"""The settings of a cache: one frozen dataclass, written once as spec.json, with its hash in every shard."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

from .errors import CacheError, expect
from .provenance import TEXTS, Provenance

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
MOST_SHARDS = 2**26
MOST_JSON = 2**22  # bytes of spec.json, plan.json and any zarr.json
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

    @property
    def grids(self) -> dict[str, tuple[float, float, float]]:
        """Step, growth and cap of the log-probabilities of the top-k ("head") and the drawn entries ("draws")."""
        return {"head": (self.step, self.growth, self.cap), "draws": (self.draw_step, 0.0, self.draw_step)}


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
            is_list = hasattr(value, "__iter__") and not isinstance(value, (str, set, frozenset))
            expect(is_list, name, value, "a list or a tuple")
            put(name, tuple(value))
            count = len(getattr(self, name))
            expect(count <= MOST_COLUMNS, f"length of {name}", count, f"at most {MOST_COLUMNS}")
        for name, (low, high) in _RANGES.items():
            put(name, integer(name, getattr(self, name), low, high))
        if self.k + self.draws == 0:
            raise CacheError("k: got 0 with draws=0; expected top-k entries, draws or both.")
        put("draw_temperature", positive("draw_temperature", self.draw_temperature))
        put("temperatures", tuple(positive("temperatures", t) for t in self.temperatures))
        ascend = list(self.temperatures) == sorted(set(self.temperatures))
        expect(ascend and 1.0 in self.temperatures, "temperatures", self.temperatures, "ascending numbers, 1.0 too")
        if self.mass is not None:
            put("mass", positive("mass", self.mass))
            expect(self.mass <= 1, "mass", self.mass, "a probability, up to 1, or None")
        for name in self.inputs:
            good = isinstance(name, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,63}", name) and name not in RESERVED
            reserved = ", ".join(sorted(RESERVED))
            expect(bool(good), "inputs", name, f"up to 64 letters, digits and _, not a reserved name ({reserved})")
        expect(len(set(self.inputs)) == len(self.inputs), "inputs", self.inputs, "distinct names")
        for name in TEXTS:
            text = getattr(self, name)
            shown = f"{len(text)} characters" if isinstance(text, str) else text
            expect(isinstance(text, str) and len(text) <= LONGEST_TEXT, name, shown, f"up to {LONGEST_TEXT} characters")
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
        return settings_hash(self)

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
        document = open_document(data, "spec.json", "fastkd-cache", FEATURES)
        required = document["required"]
        values = members_of(cls, document["spec"], "spec.json")
        try:
            spec = cls(**values | {"codec": Codec(**members_of(Codec, values["codec"], "spec.json"))})
        except CacheError as error:
            raise CacheError(f"spec.json: {str(error).removeprefix('spec.json: ')}") from error
        named = set(spec.required) <= set(required)
        expect(named, "spec.json: required", required, f"{list(spec.required)}, by its settings")
        check_hash(spec.hash, document, "spec.json")
        typed, given = asdict(spec.provenance), document.get("provenance", {})
        if not isinstance(given, dict) or any(given[name] != typed[name] for name in given.keys() & typed.keys()):
            raise CacheError(
                "spec.json: its member `provenance` differs from `teacher`, `tokenizer` and `dataset` in `spec`: the "
                "file was changed. Restore it, or delete that member."
            )
        return spec


def settings_hash(spec: Any) -> str:
    """sha256 of all fields of a spec (a dataclass) but its notes, in hexadecimal."""
    values = asdict(replace(spec, notes=""))
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def check_hash(found: str, document: Mapping[str, Any], key: str, whose: str = "") -> None:
    """CacheError unless the JSON of a spec names this hash. whose: the shards that carry it, for the message."""
    if found != document.get("sha256"):
        raise CacheError(
            f"{key}: its hash differs from its contents: the file was changed. Restore it (every shard{whose} has the "
            "hash of the original)."
        )


def differences(one: Any, other: Any) -> list[str]:
    """The fields in which two specs of one class differ, with both values; without notes."""
    return [
        f"{f.name}: {getattr(one, f.name)!r} and {getattr(other, f.name)!r}"
        for f in fields(one)
        if f.name != "notes" and getattr(one, f.name) != getattr(other, f.name)
    ]


def open_document(data: bytes, key: str, kind: str, known: frozenset[str]) -> dict[str, Any]:
    """The JSON of a spec. kind: its format. known: the features that can be read. CacheError if it cannot be."""
    document = parse_json(data, key)
    if document.get("format") != kind or "spec" not in document:
        what = f"this is not the spec of a {kind.replace('-', ' ')}"
        raise CacheError(f"{key}: {what if 'spec' in document else 'the member `spec` is missing'}.")
    version: Any = document.get("version")
    required: Any = document.get("required")
    if type(version) is not int or version != FORMAT:
        step = "Use the fastkd that wrote the cache, or a newer one."
        raise CacheError(f"{key}: got format version {version!r}; expected {FORMAT}. {step}")
    is_list = isinstance(required, list) and all(isinstance(r, str) for r in required)
    expect(is_list, f"{key}: required", required, "a list of features")
    if unknown := sorted(set(required) - known):
        raise CacheError(f"{key}: got required features {', '.join(unknown)}, unknown to this fastkd. Use a newer one.")
    return document


def parse_json(data: bytes, name: str) -> dict[str, Any]:
    """A JSON object from a file of any content. CacheError, naming the file, if it is none."""
    expect(len(data) <= MOST_JSON, name, f"{len(data)} bytes", "at most 4 MiB")
    try:
        document = json.loads(data.decode(), object_pairs_hook=_distinct, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{name}: not readable as JSON in UTF-8 ({error}).") from error
    expect(isinstance(document, dict), name, type(document).__name__, "an object")
    found: dict[str, Any] = document
    return found


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"the member {twice!r} occurs twice in an object")
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def members_of(cls: type, values: Any, key: str) -> dict[str, Any]:
    """A JSON object with exactly the fields of a dataclass. key: of the object that it is in, for messages."""
    names = sorted(f.name for f in fields(cls))
    found = sorted(values) if isinstance(values, dict) else values
    expect(found == names, f"{key}: members of {cls.__name__}", found, str(names))
    return dict(values)


def _checked(codec: Any) -> Codec:
    """The codec that a name or a `Codec` stands for, with Python's own numbers, so that equal codecs have one hash."""
    codec = CODECS.get(codec, codec) if isinstance(codec, str) else codec
    expect(isinstance(codec, Codec), "codec", codec, f"one of {', '.join(CODECS)}, or a Codec")
    numbers: dict[str, Any] = {name: positive(f"codec.{name}", getattr(codec, name)) for name in _STEPS}
    for name, value in numbers.items():
        expect(1e-4 <= value <= 8, f"codec.{name}", value, "0.0001 to 8 nats")
    growth = numbers["growth"] = number("codec.growth", codec.growth) + 0.0  # no −0
    expect(growth == 0 or 1e-4 <= growth <= 1, "codec.growth", growth, "0, or 0.0001 to 1")
    expect(numbers["cap"] >= numbers["step"], "codec.cap", codec.cap, f"at least the step of {codec.step}")
    for name in ("sort_ties", "contexts"):
        expect(isinstance(getattr(codec, name), bool), f"codec.{name}", getattr(codec, name), "True or False")
    known = isinstance(codec.compressor, str) and codec.compressor in COMPRESSORS
    expect(known, "codec.compressor", codec.compressor, f"one of {', '.join(COMPRESSORS)}")
    level = integer("codec.level", codec.level, 0, COMPRESSORS[codec.compressor])
    checked: Codec = replace(codec, level=level, **numbers)
    return checked


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """A value as an integer from low to high, both included; CacheError for any other."""
    good = not isinstance(value, bool) and hasattr(value, "__index__") and low <= int(value)
    limit = "on" if high is None else f"to {high:,}"
    expect(good and (high is None or int(value) <= high), name, value, f"an integer from {low} {limit}")
    return int(value)


def number(name: str, value: Any) -> float:
    """A value as a float, which may be infinite or NaN; CacheError if it is no number."""
    try:
        if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
            raise ValueError
        return float(value)
    except (ValueError, OverflowError, TypeError):
        raise CacheError(f"{name}: got {value!r}; expected a number.") from None


def positive(name: str, value: Any) -> float:
    """A value as a finite float above 0; CacheError for any other."""
    found = number(name, value)
    expect(0 < found < math.inf, name, value, "a positive number")
    return found
