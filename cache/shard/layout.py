"""What a shard of a cache must look like: its attributes, and the type and shape of each of its arrays. No files.

This is the table of FORMAT.md in code. An object is compared with it before memory of its sizes is allocated.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checks import check_decoded
from ..encoding.grid import LOWEST, codes_of
from ..encoding.parts import CONTEXT_STREAMS, STREAMS
from ..encoding.targets import decode_targets
from ..errors import CacheError
from ..spec import CacheSpec
from ..workspace import Workspace
from .container import INTEGERS, LARGEST, TYPES, Damage, Expected
from .kind import ShardKind, exactly, need

Array = NDArray[Any]
Arrays = dict[str, Array]
STATISTICS = ("mean", "p05", "p50", "p95")
COUNTS = ("first_sequence", "sequences", "positions", "counted", "head_entries", "draw_entries")
OPTIONAL = ("outcomes", "document_lengths")
_CODES = ("uint16", "uint32")


class TargetShards(ShardKind):
    """The shards of a cache's targets."""

    noun, whole = "target", "cache"
    counts = COUNTS
    hashes = ("content",)
    floats = tuple(f"{what}_{which}" for what in ("mass", "entropy") for which in STATISTICS)

    def __init__(self, spec: CacheSpec) -> None:
        super().__init__(spec.hash)
        self.spec = spec

    def check_counts(self, attributes: Mapping[str, Any]) -> None:
        spec, statistics = self.spec, attributes.get("statistics")
        for what in ("mass", "entropy"):
            values = statistics.get(what) if isinstance(statistics, dict) else None
            good = isinstance(values, list) and len(values) == 4 and all(v is None or _is_number(v) for v in values)
            need(good, attributes, "statistics", "four numbers each")
        n, counts = attributes["positions"], {name: attributes[name] for name in COUNTS}
        fits = 1 <= n <= spec.shard_positions and n * spec.width * 4 <= LARGEST
        need(fits, attributes, "positions", f"1 to {spec.shard_positions}, and a shard of at most {LARGEST} bytes")
        need(1 <= counts["sequences"] <= n, attributes, "sequences", f"1 to {n}")
        need(counts["counted"] <= n, attributes, "counted", f"at most {n}")
        for name, most in (("head_entries", min(spec.k, spec.vocab_size)), ("draw_entries", spec.draws)):
            need(counts[name] <= n * most, attributes, name, f"at most {n * most}")

    def floats_of(self, attributes: Mapping[str, Any]) -> dict[str, float | None]:
        found = attributes["statistics"]
        return {f"{what}_{which}": found[what][i] for what in ("mass", "entropy") for i, which in enumerate(STATISTICS)}

    def expected(self, attributes: Mapping[str, Any]) -> dict[str, Expected]:
        return expected_arrays(self.spec, attributes)

    def check_values(self, attributes: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        try:
            check_decoded(self.spec, decode_shard(self.spec, attributes, arrays))
        except CacheError as error:
            raise Damage(f"its targets cannot be a teacher's: {error}") from error


def expected_arrays(spec: CacheSpec, attributes: Mapping[str, Any]) -> dict[str, Expected]:
    """The arrays of a shard whose attributes were checked: types and shapes (FORMAT.md, "The arrays of a shard")."""
    n, sequences = exactly(attributes["positions"]), exactly(attributes["sequences"])
    arrays = {f"inputs/{name}": Expected(INTEGERS if name == "tokens" else TYPES, (n,)) for name in spec.inputs}
    arrays["tail"] = Expected(("int32",), (exactly(len(spec.temperatures)), n))
    arrays["outcomes"] = Expected(("int32",), (n,))
    arrays["sequence_lengths"] = Expected(("uint32",), (sequences,))
    arrays["document_lengths"] = Expected(("uint32",), (range(1, n.stop),))
    codec = spec.settings
    for part, capacity in (("head", spec.k), ("draws", spec.draws)):
        if not capacity:
            continue
        entries = attributes["head_entries" if part == "head" else "draw_entries"]
        most_codes = int(codes_of(np.array([LOWEST], np.float32), *codec.grids[part])[0]) + 2
        arrays[f"{part}/counts"] = Expected(("uint16",), (n,))
        arrays[f"{part}/classes"] = Expected(("uint16",), (exactly(spec.vocab_size),))
        arrays[f"{part}/grid"] = Expected(("float32",), (range(1, most_codes + 1),))
        for name in (*STREAMS[: 3 if part == "head" else 4], *(CONTEXT_STREAMS if codec.contexts else ())):
            types = {"context_tokens": ("uint32",), "context_counts": ("uint16",)}.get(name, _CODES)
            size = exactly(entries) if name in ("values", "repeats") else range(entries + 1)
            arrays[f"{part}/{name}"] = Expected(types, (size,))
    return arrays


def decode_shard(
    spec: CacheSpec, attributes: Mapping[str, Any], arrays: Mapping[str, Array], into: Workspace | None = None
) -> Arrays:
    """The arrays of `Cache.read_shard`, from those that `unpack` found to be as expected.

    Damage if one is missing, if they contradict each other or the attributes, or if a number is out of its range.
    """
    for name in expected_arrays(spec, attributes):
        if name not in arrays and name not in OPTIONAL:
            raise Damage("it is missing", name)
    check_lengths(attributes, arrays)
    tokens = arrays.get("inputs/tokens")
    if tokens is not None and (int(tokens.min()) < 0 or int(tokens.max()) >= 2**31):
        raise Damage("got numbers outside 0 to 2^31 - 1", "inputs/tokens")
    counted = np.zeros(attributes["positions"], bool)
    for part, name in (("head", "head_entries"), ("draws", "draw_entries")):
        counts = arrays.get(f"{part}/counts", np.zeros(1, np.uint16))
        counted |= counts > 0
        if (total := int(counts.sum(dtype=np.int64))) != attributes[name]:
            raise Damage(f"got a sum of {total}; expected {attributes[name]}, the {name} in its attributes", part)
    if (total := int(counted.sum())) != attributes["counted"]:
        raise Damage(f"got {attributes['counted']} rows that count in its attributes; its arrays have {total}")
    try:
        decoded: Arrays = decode_targets(spec, arrays, tokens, into)
    except (ValueError, IndexError) as error:
        raise Damage(f"it cannot be decoded ({error})") from error
    for name, array in arrays.items():
        if name.startswith("inputs/") or name.endswith("_lengths"):
            decoded[name.removeprefix("inputs/")] = array
    decoded["first_sequence"] = np.array(attributes["first_sequence"], np.int64)
    return decoded


def check_lengths(attributes: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    """Damage if lengths of sequences or documents are not positive, or do not add up to the positions."""
    n = attributes["positions"]
    for name in ("sequence_lengths", "document_lengths"):
        lengths = arrays.get(name, np.array([n], np.uint32))
        if int(lengths.min()) < 1 or int(lengths.sum(dtype=np.int64)) != n:
            raise Damage(f"expected lengths from 1 on that add up to the {n} positions", name)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2**62  # neither NaN nor infinite
