"""A shard's attributes, checked, and its streams decoded to the arrays that a reader returns. No files."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..encoding.grid import LOWEST, codes_of
from ..encoding.parts import CONTEXT_STREAMS, STREAMS
from ..encoding.targets import decode_targets
from ..errors import CacheError
from ..manifest import row_of
from ..spec import FORMAT, CacheSpec
from ..workspace import Workspace
from .container import LARGEST, Damage, read_attributes

Array = NDArray[Any]
Arrays = dict[str, Array]
_BAD = (ValueError, KeyError, IndexError, TypeError, OverflowError)  # raised for streams that contradict each other


def shard_attributes(end: bytes, spec: CacheSpec, index: int) -> dict[str, Any]:
    """The attributes of a shard, from its object or the last TAIL_LENGTH bytes of it. Raises as `check_attributes`."""
    attributes = read_attributes(end)
    check_attributes(attributes, spec, index)
    return attributes


def check_attributes(attributes: Mapping[str, Any], spec: CacheSpec, index: int) -> None:
    """Damage if the attributes are those of another shard, or of another cache."""
    for name, expected in (("format", FORMAT), ("index", index)):
        if attributes.get(name) != expected:
            raise Damage(f"got {name} {attributes.get(name)!r}; expected {expected}")
    if attributes.get("spec") != spec.hash:
        raise Damage("it belongs to a cache of other settings")
    try:
        counts = row_of(attributes, 0, "00" * 32)
    except CacheError as error:
        raise Damage(str(error)) from error
    n, sequences, entries = counts["positions"], counts["sequences"], counts["head_entries"] + counts["draw_entries"]
    if not 1 <= n <= spec.shard_positions or n * spec.width * 4 > LARGEST:
        raise Damage(f"got {n} positions of up to {spec.width} entries; that is more than a shard holds, or nothing")
    if not 1 <= sequences <= n or entries > n * spec.width or counts["counted"] > n:
        raise Damage(f"got {sequences} sequences and {entries} entries in {n} positions; expected fewer")


def known_arrays(spec: CacheSpec, attributes: Mapping[str, Any]) -> dict[str, int]:
    """The arrays that a reader knows, and how many numbers each may hold at most. The attributes are checked before."""
    n = attributes["positions"]
    sizes = {f"inputs/{name}": n for name in spec.inputs}
    sizes |= {"tail": len(spec.temperatures) * n, "outcomes": n, "sequence_lengths": n, "document_lengths": n}
    codec = spec.settings
    grids = {"head": (codec.step, codec.growth, codec.cap), "draws": (codec.draw_step, 0.0, codec.draw_step)}
    for part, grid in grids.items():
        entries = attributes["head_entries" if part == "head" else "draw_entries"]
        most_codes = int(codes_of(np.array([LOWEST], np.float32), *grid)[0]) + 2
        sizes |= {f"{part}/counts": n, f"{part}/classes": spec.vocab_size, f"{part}/grid": most_codes}
        sizes |= {f"{part}/{name}": entries for name in (*STREAMS, *CONTEXT_STREAMS)}
    return sizes


def decode_shard(
    spec: CacheSpec, attributes: Mapping[str, Any], arrays: Mapping[str, Array], into: Workspace | None = None
) -> Arrays:
    """The arrays of `Cache.read_shard`. Damage if the streams contradict each other, or the attributes."""
    _check_shapes(spec, attributes, arrays)
    try:
        decoded: Arrays = decode_targets(spec, arrays, arrays.get("inputs/tokens"), into)
    except _BAD as error:
        raise Damage(f"it cannot be decoded ({error})") from error
    for name, array in arrays.items():
        if name.startswith("inputs/"):
            decoded[name.removeprefix("inputs/")] = array
        elif name.endswith("_lengths"):
            decoded[name] = array
    decoded["first_sequence"] = np.array(attributes["first_sequence"], np.int64)
    return decoded


def _check_shapes(spec: CacheSpec, attributes: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    """Damage if the shape of an array differs from the counts."""
    n, sequences = attributes["positions"], attributes["sequences"]
    shapes: dict[str, tuple[Any, ...]] = {f"inputs/{name}": (n,) for name in spec.inputs}
    shapes |= {"tail": (len(spec.temperatures), n), "sequence_lengths": (sequences,)}
    shapes |= {f"{part}/counts": (n,) for part, there in (("head", spec.k), ("draws", spec.draws)) if there}
    if "outcomes" in arrays:
        shapes["outcomes"] = (n,)
    for name, shape in shapes.items():
        if name not in arrays:
            raise Damage("it is missing", name)
        if arrays[name].shape != shape:
            raise Damage(f"got shape {arrays[name].shape}; expected {shape}", name)
    for name in ("sequence_lengths", "document_lengths"):
        if name not in arrays:
            continue
        lengths = arrays[name]
        if (
            lengths.dtype.kind not in "iu"
            or lengths.ndim != 1
            or lengths.min(initial=1) < 1
            or lengths.max(initial=1) > n
        ):
            raise Damage(f"got lengths outside 1 to {n}", name)
        if int(lengths.sum(dtype=np.int64)) != n:
            raise Damage(f"got another sum than the {n} positions", name)
