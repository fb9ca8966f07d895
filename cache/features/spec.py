"""The settings of a feature: one frozen dataclass, written once as its spec.json, with its hash in its shards."""

import json
import re
import urllib.parse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CacheError, expect
from ..spec import (
    COMPRESSORS,
    FORMAT,
    LONGEST_TEXT,
    check_hash,
    integer,
    members_of,
    open_document,
    positive,
    settings_hash,
)
from .basis import MOST_WIDTH

FOLDER = "features/"
KINDS = {"state": 1, "map": 3, "attention_map": 2}  # and the dimensions of their values
DTYPES = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}  # of the teacher, and of exact rows on disk
FEATURES = frozenset({"hidden", "pcodec"})  # what this version reads
LONGEST_NAME = 200  # bytes of a name as part of a key
MOST_ELEMENTS, MOST_VECTORS = 2**31, 2**28  # of a shard, decoded
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHARE = re.compile(r"0\.(?!0+$)[0-9]{0,5}[1-9]")


@dataclass(frozen=True)
class FeatureSpec:
    """What a feature is, and how it is coded.

    base: the hash of the settings of the cache that it belongs to.
    name: "20" (the state that enters layer 20, from 0), "-1" (the state that enters the final norm), a module
    ("layers.3"), or a module's attention-transfer map ("layers.3:at").
    kind: "state" `[D]`, "map" `[C, H, W]`, or "attention_map" `[H, W]`. shape: of a position's value.
    layer, layers: of a state, and how many layers the teacher has; "-1" is that of `layer == layers`. Else None.
    step: of the coordinates, whose vectors have a root mean square of 1.
    positions: which positions have a value: "all", "counted" (those that count), or a random share ("0.25").
    seed: of that share. dtype: the teacher's: "float32", "float16" or "bfloat16".
    basis: the hash of the basis (`Basis.sha256`). block: sha256 of the block beside it, or None.
    level: of the compressor. notes: free text that is not covered by the hash.

    Raises CacheError for a value that a feature cannot have.
    """

    base: str
    name: str
    kind: str
    layer: int | None
    layers: int | None
    shape: tuple[int, ...]
    step: float
    positions: str
    seed: int
    dtype: str
    basis: str
    block: str | None = None
    level: int = 8
    notes: str = ""

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        check_name(self.name)
        for name in ("base", "basis", "block"):
            value = getattr(self, name)
            good = (isinstance(value, str) and bool(_SHA256.fullmatch(value))) or (name == "block" and value is None)
            expect(good, name, value, "a sha256, 64 hexadecimal digits")
        expect(isinstance(self.kind, str) and self.kind in KINDS, "kind", self.kind, f"one of {', '.join(KINDS)}")
        put("shape", tuple(integer("shape", size, 1, 2**20) for size in self.shape))
        expect(len(self.shape) == KINDS[self.kind], "shape", self.shape, f"{KINDS[self.kind]} sizes")
        expect(self.width <= MOST_WIDTH, "width", self.width, f"vectors of at most {MOST_WIDTH} components")
        expect(self.most_positions >= 1, "shape", self.shape, f"at most {MOST_ELEMENTS} elements")
        if self.kind == "state":
            put("layers", integer("layers", self.layers, 1, 2**16))
            put("layer", self.layers if self.layer == -1 else integer("layer", self.layer, 0, self.layers))
            own = "-1" if self.layer == self.layers else str(self.layer)
            expect(self.name == own, "name", self.name, f"{own!r}, of layer {self.layer} of {self.layers}")
        else:
            expect(self.layer is None and self.layers is None, "layer", self.layer, "None, except for a state")
        put("step", positive("step", self.step))
        expect(1e-4 <= self.step <= 8, "step", self.step, "0.0001 to 8")
        text = self.positions if isinstance(self.positions, str) else ""
        share = text in ("all", "counted") or bool(_SHARE.fullmatch(text))
        expect(share, "positions", self.positions, '"all", "counted" or a share like "0.25"')
        put("seed", integer("seed", self.seed, 0, 2**63 - 1))
        expect(isinstance(self.dtype, str) and self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        put("level", integer("level", self.level, 0, COMPRESSORS["pcodec"]))
        good = isinstance(self.notes, str) and len(self.notes) <= LONGEST_TEXT
        expect(good, "notes", self.notes if good else "other notes", f"up to {LONGEST_TEXT} characters")

    @property
    def vectors(self) -> int:
        """P, the vectors of a position: the pixels of a map; 1 of anything else."""
        return vectors_and_width(self.kind, self.shape)[0]

    @property
    def width(self) -> int:
        """W, the components of a vector: the channels of a map; all elements of anything else."""
        return vectors_and_width(self.kind, self.shape)[1]

    @property
    def most_positions(self) -> int:
        """The positions that a shard may have at most."""
        return min(MOST_ELEMENTS // prod(self.shape), MOST_VECTORS // self.vectors)

    @property
    def compressor(self) -> str:
        """As in `Codec`."""
        return "pcodec"

    @property
    def folder(self) -> str:
        """Where its objects are: "features/20/"."""
        return folder_of(self.name)

    @property
    def hash(self) -> str:
        """sha256 of all fields but the notes, in hexadecimal. Every shard carries it."""
        return settings_hash(self)

    def to_json(self) -> bytes:
        """spec.json."""
        document = {
            "format": "fastkd-feature",
            "version": FORMAT,
            "required": sorted(FEATURES),
            "optional": (),
            "sha256": self.hash,
            "spec": asdict(self),
        }
        return json.dumps(document, indent=2, allow_nan=False).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes, key: str = "spec.json") -> "FeatureSpec":
        """The spec in an object. key: its name, for messages. CacheError as `CacheSpec.from_json`."""
        document = open_document(data, key, "fastkd-feature", FEATURES)
        values = members_of(cls, document["spec"], key)
        expect(isinstance(values["shape"], list), f"{key}: shape", values["shape"], "a list of sizes")
        try:
            spec = cls(**values)
        except CacheError as error:
            raise CacheError(f"{key}: {error}") from error
        named = set(FEATURES) <= set(document["required"])
        expect(named, f"{key}: required", document["required"], f"{sorted(FEATURES)}")
        check_hash(spec.hash, document, key, " of the feature")
        return spec


def vectors_and_width(kind: str, shape: Sequence[int]) -> tuple[int, int]:
    """P and W: a value of this kind and shape is coded as P vectors of W components."""
    return (shape[1] * shape[2], shape[0]) if kind == "map" else (1, prod(shape))


def vector_numbers(positions: NDArray[np.int64], vectors: int) -> NDArray[np.int64]:
    """The numbers of all vectors of some positions, position · P + vector."""
    return (positions[:, None] * vectors + np.arange(vectors)).ravel()


def check_name(name: Any) -> None:
    """CacheError unless a feature can be called so."""
    good = isinstance(name, str) and name.isprintable() and name not in ("", ".", "..")
    good = good and len(urllib.parse.quote(name, safe="")) <= LONGEST_NAME
    expect(good, "name", name, f"a layer's number, or a module's name, of up to {LONGEST_NAME} characters")


def folder_of(name: str) -> str:
    """The folder of a feature's objects. Other characters than letters, digits and `_.-~` become %XX."""
    check_name(name)
    return f"{FOLDER}{urllib.parse.quote(name, safe='')}/"


def name_of(key: str) -> str | None:
    """The name of the feature that an object belongs to; None for an object of none."""
    folder, _, rest = key.removeprefix(FOLDER).partition("/")
    name = urllib.parse.unquote(folder, errors="strict") if key.startswith(FOLDER) and rest else ""
    try:
        return name if name and folder_of(name) == f"{FOLDER}{folder}/" else None
    except (CacheError, UnicodeError):
        return None
