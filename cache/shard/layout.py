"""What a shard of a cache must look like: its attributes, and the type and shape of each of its arrays. No files.

This is the table of FORMAT.md in code. An object is compared with it before memory of its sizes is allocated.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..encoding.grid import LOWEST, codes_of
from ..encoding.parts import CONTEXT_STREAMS, STREAMS
from ..encoding.targets import decode_targets
from ..spec import FORMAT, CacheSpec
from ..workspace import Workspace
from .container import INTEGERS, LARGEST, TYPES, Damage, Expected, read_attributes

Array = NDArray[Any]
Arrays = dict[str, Array]
COUNTS = ("first_sequence", "sequences", "positions", "counted", "head_entries", "draw_entries")
OPTIONAL = ("outcomes", "document_lengths")
_CODES = ("uint16", "uint32")


def shard_attributes(end: bytes, spec: CacheSpec, index: int) -> dict[str, Any]:
    """The attributes of a shard, from its object or the last TAIL_LENGTH bytes of it. Raises as `check_attributes`."""
    attributes = read_attributes(end)
    check_attributes(attributes, spec, index)
    return attributes


def check_attributes(attributes: Mapping[str, Any], spec: CacheSpec, index: int) -> None:
    """Damage if the attributes are malformed, or those of another shard, or of another cache."""

    def need(good: bool, name: str, expected: Any) -> None:
        if not good:
            got = repr(attributes.get(name))
            raise Damage(f"its {name}: got {got if len(got) < 80 else got[:80] + ' …'}; expected {expected}")

    for name, number in (("format", FORMAT), ("index", index)):
        need(type(attributes.get(name)) is int and attributes[name] == number, name, number)
    if attributes.get("spec") != spec.hash:
        raise Damage("it belongs to a cache of other settings")
    for name in (*COUNTS, "written"):
        value = attributes.get(name)
        need(type(value) is int and 0 <= value < 10**18, name, "an integer from 0 on")
    for name, digits in (("content", 64), ("attempt", 32)):
        value = attributes.get(name)
        need(isinstance(value, str) and bool(re.fullmatch(f"[0-9a-f]{{{digits}}}", value)), name, f"{digits} digits")
    statistics = attributes.get("statistics")
    for what in ("mass", "entropy"):
        values = statistics.get(what) if isinstance(statistics, dict) else None
        good = isinstance(values, list) and len(values) == 4 and all(v is None or _is_number(v) for v in values)
        need(good, "statistics", "four numbers each")
    n, counts = attributes["positions"], {name: attributes[name] for name in COUNTS}
    fits = 1 <= n <= spec.shard_positions and n * spec.width * 4 <= LARGEST
    need(fits, "positions", f"1 to {spec.shard_positions}, and a shard of at most {LARGEST} bytes")
    need(1 <= counts["sequences"] <= n, "sequences", f"1 to {n}")
    need(counts["counted"] <= n, "counted", f"at most {n}")
    for name, most in (("head_entries", min(spec.k, spec.vocab_size)), ("draw_entries", spec.draws)):
        need(counts[name] <= n * most, name, f"at most {n * most}")


def expected_arrays(spec: CacheSpec, attributes: Mapping[str, Any]) -> dict[str, Expected]:
    """The arrays of a shard whose attributes were checked: types and shapes (FORMAT.md, "The arrays of a shard")."""
    n, sequences = _exactly(attributes["positions"]), _exactly(attributes["sequences"])
    arrays = {f"inputs/{name}": Expected(INTEGERS if name == "tokens" else TYPES, (n,)) for name in spec.inputs}
    arrays["tail"] = Expected(("int32",), (_exactly(len(spec.temperatures)), n))
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
        arrays[f"{part}/classes"] = Expected(("uint16",), (_exactly(spec.vocab_size),))
        arrays[f"{part}/grid"] = Expected(("float32",), (range(1, most_codes + 1),))
        for name in (*STREAMS[: 3 if part == "head" else 4], *(CONTEXT_STREAMS if codec.contexts else ())):
            types = {"context_tokens": ("uint32",), "context_counts": ("uint16",)}.get(name, _CODES)
            size = _exactly(entries) if name in ("values", "repeats") else range(entries + 1)
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


def _exactly(size: int) -> range:
    return range(size, size + 1)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2**62  # neither NaN nor infinite
