"""What a cache is: one frozen dataclass, written once as spec.json, its hash in every shard."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

from .errors import CacheError
from .provenance import Provenance

FORMAT = 1
# What a reader of this version understands. A cache names the features it cannot be read without.
FEATURES = frozenset({"rows", "draws", "ties", "contexts", "pcodec", "zstd"})
RESERVED = frozenset(
    {"ids", "logprobs", "tail", "draws", "outcomes", "sequence_lengths", "document_lengths", "first_sequence"}
)
COMPRESSORS = ("pcodec", "zstd")
STEPS = ("step", "cap", "tail_step", "draw_step")
MOST_COLUMNS = 64  # inputs, and temperatures: what a shard says of itself has to fit into its last 64 KiB
LONGEST_TEXT = 2**16  # characters: spec.json stays below the size that a reader takes


@dataclass(frozen=True)
class Codec:
    """How targets become bytes. Steps are in nats; see FORMAT.md.

    step, growth, cap: the grid of the head's log-probabilities: min(step·e^(growth·x), cap) at a log-probability of −x.
    tail_step: of the tails. draw_step: of the drawn entries' log-probabilities.
    sort_ties: entries of equal code go by rank, which is smaller; without, they keep their order.
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
    """The settings and fingerprints of a cache.

    vocab_size: the width of the teacher's head. k: entries of a row's exact head, at most. draws: drawn entries, at
    most.
    draw_temperature: what they are drawn at. mass: where heads are cut (None: nowhere).
    temperatures: where tails are stored; ascending, 1.0 among them.
    shard_positions: positions a shard, at most.
    codec: the name of a setting ("fast", "default", "smallest", "portable") or a `Codec`.
    inputs: the names of the input columns.
    teacher, tokenizer, dataset: fingerprints, free text; `Provenance.texts` makes them. notes: free text that is no
    part of the hash.

    Raises CacheError where a value is not one that a cache can have.
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
        if isinstance(self.codec, str):
            if self.codec not in CODECS:
                raise CacheError(f"codec: got {self.codec!r}; expected one of {', '.join(CODECS)}, or a Codec.")
            object.__setattr__(self, "codec", CODECS[self.codec])
        if not isinstance(self.codec, Codec):
            raise CacheError(f"codec: got {self.codec!r}; expected one of {', '.join(CODECS)}, or a Codec.")
        for name in ("temperatures", "inputs"):
            value = getattr(self, name)
            if isinstance(value, (str, set, frozenset)) or not hasattr(value, "__iter__"):
                raise CacheError(f"{name}: got {value!r}; expected a sequence, in an order of its own.")
            object.__setattr__(self, name, tuple(value))
            if len(getattr(self, name)) > MOST_COLUMNS:
                raise CacheError(f"{name}: got {len(getattr(self, name))}; {MOST_COLUMNS} are possible.")
        for name, low, high in (
            ("vocab_size", 1, 2**26),
            ("k", 0, 2**16 - 1),
            ("draws", 0, 2**16 - 1),
            ("shard_positions", 1, 2**31 - 1),
        ):
            object.__setattr__(self, name, _integer(name, getattr(self, name), low, high))
        if self.k + self.draws == 0:
            raise CacheError("k: got 0 with draws=0; expected a head, draws or both.")
        object.__setattr__(self, "draw_temperature", _positive("draw_temperature", self.draw_temperature))
        object.__setattr__(self, "temperatures", tuple(_positive("temperatures", t) for t in self.temperatures))
        if 1.0 not in self.temperatures or list(self.temperatures) != sorted(set(self.temperatures)):
            raise CacheError(f"temperatures: got {self.temperatures}; expected ascending numbers with 1.0 among them.")
        if self.mass is not None:
            object.__setattr__(self, "mass", _positive("mass", self.mass))
            if not self.mass <= 1:
                raise CacheError(f"mass: got {self.mass}; expected a probability, up to 1, or None.")
        for name in self.inputs:
            if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,63}", name) or name in RESERVED:
                raise CacheError(f"inputs: got {name!r}; expected a name of letters, digits and _, and none of ours.")
        if len(set(self.inputs)) != len(self.inputs):
            raise CacheError(f"inputs: got {self.inputs}; expected distinct names.")
        for name in ("teacher", "tokenizer", "dataset", "notes"):
            if not isinstance(getattr(self, name), str):
                raise CacheError(f"{name}: got {getattr(self, name)!r}; expected text.")
            if len(getattr(self, name)) > LONGEST_TEXT:
                raise CacheError(f"{name}: got {len(getattr(self, name))} characters; {LONGEST_TEXT} are possible.")
        object.__setattr__(self, "codec", _checked(self.codec))
        if self.codec.contexts and "tokens" not in self.inputs:
            raise CacheError(
                'codec: contexts need the input column "tokens"; use another setting, or name that column.'
            )

    @property
    def settings(self) -> Codec:
        """The codec, as the `Codec` it stands for."""
        assert isinstance(self.codec, Codec)
        return self.codec

    @property
    def width(self) -> int:
        """The places of a decoded row: head and draws."""
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
        """sha256 of everything but the notes, in hexadecimal: what every shard carries."""
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
        """The spec in spec.json. CacheError where it is none, is damaged, or asks for what this version cannot read."""
        document = parse_json(data, "spec.json")
        if document.get("format") != "fastkd-cache":
            raise CacheError("spec.json: this is not the spec of a fastkd cache.")
        if type(document.get("version")) is not int or document["version"] != FORMAT:
            raise CacheError(
                f"spec.json: found format version {document.get('version')!r}, this fastkd reads version {FORMAT}; "
                "use the fastkd that wrote the cache, or a newer one."
            )
        required = document.get("required")
        if not isinstance(required, list) or not all(isinstance(r, str) for r in required):
            raise CacheError(f"spec.json: required: got {required!r}; expected a list of features.")
        if unknown := sorted(set(required) - FEATURES):
            raise CacheError(
                f"spec.json: the cache needs {', '.join(unknown)}, which this fastkd does not know; use a newer one."
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
            raise CacheError(f"spec.json: required: got {required}; its settings need {list(spec.required)}.")
        if spec.hash != document.get("sha256"):
            raise CacheError(
                "spec.json: its hash does not fit its contents: the file was changed. Restore it (every shard carries "
                "the hash of the true one)."
            )
        typed, given = asdict(spec.provenance), document.get("provenance", {})
        if not isinstance(given, dict) or any(given[name] != typed[name] for name in given.keys() & typed.keys()):
            raise CacheError(
                "spec.json: its member `provenance` differs from `teacher`, `tokenizer` and `dataset` in `spec`: the "
                "file was changed. Restore it, or delete that member."
            )
        return spec


def differences(one: CacheSpec, other: CacheSpec) -> list[str]:
    """The fields of the hash that two specs differ in, with both values."""
    return [
        f"{f.name}: {getattr(one, f.name)!r} and {getattr(other, f.name)!r}"
        for f in fields(CacheSpec)
        if f.name != "notes" and getattr(one, f.name) != getattr(other, f.name)
    ]


def parse_json(data: bytes, name: str) -> dict[str, Any]:
    """A JSON object from a file that may hold anything."""
    if len(data) > 2**22:
        raise CacheError(f"{name}: got {len(data)} bytes; this is no metadata of a cache.")
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
        raise CacheError(f"spec.json: got {found} where {sorted(names)} are needed.")
    return dict(values)


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or not low <= int(value) <= high:
        raise CacheError(f"{name}: got {value!r}; expected an integer from {low} to {high}.")
    return int(value)


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
            raise ValueError
        return float(value)
    except (ValueError, OverflowError, TypeError):
        raise CacheError(f"{name}: got {value!r}; expected a number.") from None


def _positive(name: str, value: Any) -> float:
    number = _number(name, value)
    if not 0 < number < math.inf:
        raise CacheError(f"{name}: got {value!r}; expected a positive number.")
    return number


def _checked(codec: Codec) -> Codec:
    """The codec with its numbers as Python's own, so that equal codecs have one hash."""
    numbers: dict[str, Any] = {name: _positive(f"codec.{name}", getattr(codec, name)) for name in STEPS}
    for name, value in numbers.items():
        if not 1e-4 <= value <= 8:
            raise CacheError(f"codec.{name}: got {value}; 0.0001 to 8 nats are possible.")
    numbers["growth"] = _number("codec.growth", codec.growth) + 0.0  # no −0
    if numbers["growth"] and not 1e-4 <= numbers["growth"] <= 1:
        raise CacheError(f"codec.growth: got {codec.growth!r}; 0, and 0.0001 to 1, are possible.")
    if numbers["cap"] < numbers["step"]:
        raise CacheError(f"codec.cap: got {codec.cap}, below the step of {codec.step}.")
    for name in ("sort_ties", "contexts"):
        if not isinstance(getattr(codec, name), bool):
            raise CacheError(f"codec.{name}: got {getattr(codec, name)!r}; expected True or False.")
    if codec.compressor not in COMPRESSORS:
        raise CacheError(f"codec.compressor: got {codec.compressor!r}; expected one of {', '.join(COMPRESSORS)}.")
    level = _integer("codec.level", codec.level, 0, 12 if codec.compressor == "pcodec" else 19)
    return replace(codec, level=level, **numbers)
