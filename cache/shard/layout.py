"""What a shard of a cache must look like: the type and shape of each of its arrays. No files.

This is the table of FORMAT.md in code. An object is compared with it before memory of its sizes is allocated.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..encoding.grid import LOWEST, codes_of
from ..encoding.parts import CONTEXT_STREAMS, STREAMS
from ..encoding.targets import decode_targets
from ..spec import CacheSpec
from ..workspace import Workspace
from .container import INTEGERS, TYPES, Damage, Expected
from .kind import exactly

Array = NDArray[Any]
Arrays = dict[str, Array]
COUNTS = ("first_sequence", "sequences", "positions", "counted", "head_entries", "draw_entries")
OPTIONAL = ("outcomes", "document_lengths")
_CODES = ("uint16", "uint32")


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
