"""A shard's streams as one object: a stored zip that holds a Zarr v3 group and ends in its own hash.

Any Zarr reader opens it. This file reads and writes it without zarr, because an object that may be damaged or forged
must be checked before anything is allocated, and because opening a Zarr array takes milliseconds. `Cache.zarr_group`
opens the same object with zarr.
"""

import hashlib
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numcodecs.pcodec import PCodec
from numcodecs.zstd import Zstd
from numpy.typing import NDArray
from pcodec import standalone

from ..errors import CacheError
from ..spec import Codec, parse_json
from ..workspace import Workspace, new_array

Array = NDArray[Any]

SEAL = b"fastkd-sha256:"
HASH_LENGTH = 64  # hexadecimal digits, the last bytes of the object
TAIL_LENGTH = 1 << 16  # of an object: holds its directory, its attributes and its hash
_DATE = (1980, 1, 1, 0, 0, 0)
_ATTRIBUTES = "zarr.json"
_PAGE = 2**14, 2**18  # numbers with common statistics in pcodec: about one column of all rows
_DTYPES = {
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64",
}  # fmt: skip
_BY_PCODEC = _DTYPES - {"bool", "int8", "uint8"}
LARGEST = 2**33  # bytes of all decoded streams together, and of one decoded array; larger shards are refused


class Damage(ValueError):
    """An object is damaged. array: in which of its arrays; None where that is not known."""

    def __init__(self, what: str, array: str | None = None) -> None:
        super().__init__(what)
        self.array = array


def pack(arrays: Mapping[str, Array], attributes: Mapping[str, Any], codec: Codec, positions: int) -> bytes:
    """The object. arrays: by their path in the group, sorted into it by name; attributes: JSON."""
    if (size := sum(array.nbytes for array in arrays.values())) > LARGEST:
        raise CacheError(f"got {size} bytes of streams; expected at most {LARGEST}. Make the shards smaller.")
    buffer = io.BytesIO()
    sizes: dict[str, int] = {}
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for folder in sorted({name.rpartition("/")[0] for name in arrays} - {""}):
            _add(archive, f"{folder}/zarr.json", _json(_group({})))
        for name in sorted(arrays):
            array = np.ascontiguousarray(arrays[name])
            codecs, data = _smallest(array, codec, positions, either=name.startswith("inputs/"))
            _add(archive, f"{name}/zarr.json", _json(_array(array, codecs)))
            if array.size:
                sizes[name] = len(data)
                _add(archive, f"{name}/c/" + "/".join("0" * array.ndim), data)
        # last, so that the end of the object tells everything about it
        _add(archive, _ATTRIBUTES, _json(_group({"fastkd": {**attributes, "bytes": sizes}})))
        archive.comment = SEAL + b"0" * HASH_LENGTH
    whole = buffer.getbuffer()
    whole[-HASH_LENGTH:] = digest(whole).encode()
    return bytes(whole)


def digest(data: bytes | memoryview) -> str:
    """sha256 of the object without its own hash."""
    return hashlib.sha256(memoryview(data)[:-HASH_LENGTH]).hexdigest()


def content_hash(arrays: Mapping[str, Array]) -> str:
    """sha256 of the arrays, independent of their compression."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        total.update(f"{name}:{array.dtype.name}:{','.join(map(str, array.shape))};".encode())
        total.update(little.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def stored_digest(data: bytes) -> str:
    """The hash at the end of an object. Damage if there is none."""
    if len(data) < HASH_LENGTH + len(SEAL) or data[-HASH_LENGTH - len(SEAL) : -HASH_LENGTH] != SEAL:
        raise Damage("it does not end in a shard's hash: it is truncated, or not a shard")
    return data[-HASH_LENGTH:].decode("ascii", "replace")


def read_attributes(end: bytes) -> dict[str, Any]:
    """The attributes, from the last TAIL_LENGTH bytes of an object. Damage if they are incomplete."""
    stored_digest(end)
    members = _directory(end)
    if _ATTRIBUTES not in members:
        raise Damage("it has no zarr.json")
    return _attributes(_member(end, members[_ATTRIBUTES], check=True))


def check_bytes(data: bytes) -> None:
    """Damage, naming the array, if the object differs from the hash it ends in."""
    if stored_digest(data) != digest(data):
        where = _first_bad_member(data)
        raise Damage(
            f"its bytes differ from its sha256{'' if where else ' (in its zip headers or the hash itself)'}", where
        )


def unpack(data: bytes, known: Mapping[str, int], streams: Workspace | None = None) -> dict[str, Array]:
    """The arrays of an object whose bytes were checked. Damage, naming the array, if one cannot be read.

    known: the arrays to read, and how many numbers each holds at most; others are skipped.
    streams: memory for the streams (all but the inputs and the lengths, which the caller keeps).
    """
    members = _directory(data)
    arrays: dict[str, Array] = {}
    left = LARGEST
    for path in sorted(members):
        name = path.removesuffix("/zarr.json")
        if name == path or name not in known:
            continue
        try:
            meta = parse_json(bytes(_member(data, members[path])), path)
            own = streams is None or name.startswith("inputs/") or name.endswith("_lengths")
            allocate = new_array if own or streams is None else streams.array
            arrays[name] = _read_array(data, members, name, meta, min(left, 8 * known[name]), allocate)
            left -= arrays[name].nbytes
        except (CacheError, ValueError, RuntimeError, TypeError) as error:
            raise Damage(str(error), name) from error
    return arrays


def length_of_end(attributes: Mapping[str, Any], name: str) -> int:
    """Bytes at the end of an object that contain all of an array: members are sorted by name."""
    sizes = attributes.get("bytes")
    if not isinstance(sizes, dict) or not all(type(size) is int and size >= 0 for size in sizes.values()):
        raise Damage("it does not have the sizes of its arrays")
    after: int = sum(size + 4096 for other, size in sizes.items() if other >= name)
    return TAIL_LENGTH + after


def unpack_end(end: bytes, name: str, most: int) -> Array:
    """One array, of at most `most` numbers, from the end of an object. Damage if it is missing or incomplete."""
    members = _directory(end)
    path = f"{name}/zarr.json"
    try:
        if path not in members:
            raise ValueError("it is missing")
        meta = parse_json(bytes(_member(end, members[path], check=True)), path)
        for member in members:
            if member.startswith(f"{name}/c/"):
                _member(end, members[member], check=True)  # the seal covers the whole object
        return _read_array(end, members, name, meta, 8 * most, new_array)
    except (CacheError, ValueError, RuntimeError, TypeError) as error:
        raise Damage(str(error), name) from error


def members(data: bytes) -> dict[str, bytes]:
    """The members of an object, by name. Damage if its zip directory is invalid."""
    return {name: bytes(_member(data, member, check=True)) for name, member in _directory(data).items()}


def _read_array(
    data: bytes,
    members: Mapping[str, zipfile.ZipInfo],
    name: str,
    meta: dict[str, Any],
    largest: int,
    allocate: Callable[[str, tuple[int, ...], np.dtype[Any]], Array],
) -> Array:
    shape, dtype, codecs = _array_meta(meta, largest)
    if 0 in shape:
        return np.zeros(shape, dtype)
    chunk = members.get(f"{name}/c/" + "/".join("0" * len(shape)))
    if chunk is None:
        raise ValueError("its chunk is missing")
    out = allocate(name, shape, dtype)
    _decompress(_member(data, chunk), out.reshape(-1), codecs)
    return out


def _decompress(data: memoryview, flat: Array, codecs: list[dict[str, Any]]) -> None:
    if codecs[0]["name"] == "numcodecs.pcodec":
        # numcodecs does not report that fewer numbers came than expected
        progress = standalone.simple_decompress_into(bytes(data), flat)
        if progress.n_processed != flat.size or not progress.finished:
            raise ValueError(f"got {progress.n_processed} numbers or more; expected {flat.size}")
        return
    size = _zstd_size(data)
    if size != flat.nbytes:
        raise ValueError(f"got a frame of {size} bytes; expected {flat.nbytes}")
    Zstd().decode(data, out=flat.view(np.uint8))


def _zstd_size(frame: memoryview) -> int:
    """The decoded size in the header of a Zstandard frame (RFC 8878, 3.1.1)."""
    if len(frame) < 6 or bytes(frame[:4]) != b"\x28\xb5\x2f\xfd":
        raise ValueError("it is not a Zstandard frame")
    flags = frame[4]
    single, size_flag = flags >> 5 & 1, flags >> 6
    at = 5 + (0 if single else 1) + (0, 1, 2, 4)[flags & 3]
    length = (1 if single else 0, 2, 4, 8)[size_flag]
    if not length or len(frame) < at + length:
        raise ValueError("its Zstandard frame does not have its size")
    return int.from_bytes(frame[at : at + length], "little") + (256 if length == 2 else 0)


def _compress(array: Array, codecs: list[dict[str, Any]]) -> bytes:
    flat = array.astype(array.dtype.newbyteorder("<"), copy=False).reshape(-1)
    if codecs[0]["name"] == "numcodecs.pcodec":
        return bytes(PCodec(**codecs[0]["configuration"]).encode(flat))
    return bytes(Zstd(**codecs[1]["configuration"]).encode(flat.view(np.uint8)))


def _smallest(array: Array, codec: Codec, positions: int, *, either: bool) -> tuple[list[dict[str, Any]], bytes]:
    """Codecs of an array, and its compressed bytes. either: try both zstd and pcodec (text has repetitions)."""
    if array.dtype.name not in _DTYPES:
        raise CacheError(f"got an array of {array.dtype}; expected one of {', '.join(sorted(_DTYPES))}.")
    by_pcodec = codec.compressor == "pcodec" and array.dtype.name in _BY_PCODEC
    choices = [_pcodec(array, codec, positions)] if by_pcodec else []
    if either or not by_pcodec:
        choices.append(_zstd(codec.level if codec.compressor == "zstd" else 9))
    coded = [(codecs, _compress(array, codecs) if array.size else b"") for codecs in choices]
    return min(coded, key=lambda c: len(c[1]))


def _pcodec(array: Array, codec: Codec, positions: int) -> list[dict[str, Any]]:
    # The streams are differences already: order 0 in every version of pcodec.
    delta = {"delta_spec": "try_consecutive", "delta_encoding_order": 0} if array.dtype.kind == "u" else {}
    page = min(max(positions, _PAGE[0]), _PAGE[1])
    options = {"level": codec.level, "mode_spec": "classic", **delta, "equal_pages_up_to": page}
    return [{"name": "numcodecs.pcodec", "configuration": options}]


def _zstd(level: int) -> list[dict[str, Any]]:
    return [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "zstd", "configuration": {"level": level, "checksum": True}},
    ]


def _array_meta(meta: dict[str, Any], largest: int) -> tuple[tuple[int, ...], np.dtype[Any], list[dict[str, Any]]]:
    shape, dtype, codecs = meta.get("shape"), meta.get("data_type"), meta.get("codecs")
    if meta.get("zarr_format") != 3 or meta.get("node_type") != "array":
        raise ValueError("it is not a Zarr v3 array")
    if not isinstance(shape, list) or not 1 <= len(shape) <= 2 or not all(type(s) is int and s >= 0 for s in shape):
        raise ValueError(f"got shape {shape!r}; expected one or two sizes")
    if dtype not in _DTYPES:
        raise ValueError(f"got data type {dtype!r}")
    if int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize > largest:
        raise ValueError(f"got shape {shape}: more than a shard can hold")
    names = (
        [c.get("name") for c in codecs] if isinstance(codecs, list) and all(isinstance(c, dict) for c in codecs) else []
    )
    if names not in (["numcodecs.pcodec"], ["bytes", "zstd"]):
        raise ValueError(f"got codecs {codecs!r}; expected numcodecs.pcodec, or bytes and zstd")
    assert isinstance(codecs, list)
    if names[0] == "bytes" and np.dtype(dtype).itemsize > 1 and _setting(codecs[0], "endian") != "little":
        raise ValueError(f"got codecs {codecs!r}; expected little-endian bytes")
    grid = meta.get("chunk_grid")
    if not isinstance(grid, dict) or _setting(grid, "chunk_shape") != [max(s, 1) for s in shape]:
        raise ValueError(f"got chunk grid {grid!r}; expected one chunk of the array's shape")
    return tuple(shape), np.dtype(dtype).newbyteorder("<"), codecs


def _setting(of: Mapping[str, Any], name: str) -> Any:
    """A member of the configuration of a codec or a chunk grid; None if it is missing."""
    configuration = of.get("configuration")
    return configuration.get(name) if isinstance(configuration, dict) else None


def _array(array: Array, codecs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(array.shape),
        "data_type": array.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [max(s, 1) for s in array.shape]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": False if array.dtype.kind == "b" else 0.0 if array.dtype.kind == "f" else 0,
        "codecs": codecs,
        "attributes": {},
    }


def _group(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode()


def _attributes(data: bytes | memoryview) -> dict[str, Any]:
    try:
        document = parse_json(bytes(data), "zarr.json")
    except CacheError as error:
        raise Damage(str(error)) from error
    attributes = document.get("attributes")
    own = attributes.get("fastkd") if isinstance(attributes, dict) else None
    if not isinstance(own, dict):
        raise Damage("its zarr.json has no member `fastkd` in its attributes")
    return own


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    info = zipfile.ZipInfo(name, _DATE)
    info.external_attr = 0o644 << 16
    info.create_system = 3
    archive.writestr(info, data)


def _directory(end: bytes | memoryview) -> dict[str, zipfile.ZipInfo]:
    """The members in the directory at the end of an object: stored, distinct. Offsets are relative to `end`."""
    try:
        with zipfile.ZipFile(io.BytesIO(end)) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, struct.error, NotImplementedError, OverflowError) as error:
        raise Damage(f"its zip directory is damaged ({error})") from error
    found: dict[str, zipfile.ZipInfo] = {}
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise Damage(f"its member {member.filename!r} is compressed")
        if member.filename.startswith("/") or not {"", ".", ".."}.isdisjoint(member.filename.split("/")):
            raise Damage(f"its member {member.filename!r} leads out of it")
        if member.filename in found:
            raise Damage(f"its member {member.filename!r} occurs twice")
        found[member.filename] = member
    return found


def _member(end: bytes | memoryview, member: zipfile.ZipInfo, *, check: bool = False) -> memoryview:
    """A view of the bytes of a member. check: compare them with its CRC-32."""
    offset = member.header_offset
    if not 0 <= offset <= len(end) - 30 or bytes(end[offset : offset + 4]) != b"PK\x03\x04":
        raise Damage(f"its member {member.filename!r} is not where the directory says")
    name_length, extra_length = struct.unpack_from("<HH", end, offset + 26)
    start = offset + 30 + name_length + extra_length
    data = memoryview(end)[start : start + member.file_size]
    if len(data) != member.file_size or (check and zlib.crc32(data) != member.CRC):
        raise Damage(f"its member {member.filename!r} is damaged", _array_of(member.filename))
    return data


def _array_of(member: str) -> str | None:
    """The array of a member; None for a group."""
    name = member.partition("/c/")[0].removesuffix("/zarr.json")
    return None if name in ("", "zarr.json") else name


def _first_bad_member(data: bytes) -> str | None:
    """The array of the first member that differs from its CRC-32; None where none does, or it is not known."""
    try:
        for member in _directory(data).values():
            _member(data, member, check=True)
    except Damage as damage:
        return damage.array
    return None
