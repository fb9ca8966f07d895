"""A shard's streams as one object: a stored zip that holds a Zarr v3 group and ends in its own hash.

Any Zarr reader opens it. This file reads and writes it without zarr, because an object that may be damaged or forged
must be checked before anything is allocated, and because opening a Zarr array takes milliseconds. `Cache.zarr_group`
opens the same object with zarr.
"""

import hashlib
import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple, Protocol

import numpy as np
from numcodecs.pcodec import PCodec
from numcodecs.zstd import Zstd
from numpy.typing import NDArray
from pcodec import standalone

from ..errors import CacheError
from ..spec import parse_json
from ..workspace import Workspace

Array = NDArray[Any]

SEAL = b"fastkd-sha256:"
HASH_LENGTH = 64  # hexadecimal digits, the last bytes of the object
TAIL_LENGTH = 1 << 16  # of an object: holds its directory, its attributes and its hash
_DATE = (1980, 1, 1, 0, 0, 0)
_ATTRIBUTES = "zarr.json"
_PAGE = 2**14, 2**18  # numbers with common statistics in pcodec: about one column of all rows
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
TYPES = ("bool", *INTEGERS, "float16", "float32", "float64")
_NOT_BY_PCODEC = ("bool", "int8", "uint8")
LARGEST = 2**33  # bytes of all decoded streams together, and of one decoded array; larger shards are refused


class Expected(NamedTuple):
    """What an array may be: its types by name, and for each dimension the sizes that it may have."""

    types: tuple[str, ...]
    shape: tuple[range, ...]


class Compression(Protocol):
    """What the arrays are compressed with, as in `Codec`."""

    @property
    def compressor(self) -> str: ...
    @property
    def level(self) -> int: ...


class Damage(Exception):
    """An object is damaged. array: in which of its arrays; None where that is not known."""

    def __init__(self, what: str, array: str | None = None) -> None:
        super().__init__(what)
        self.array = array


def pack(
    arrays: Mapping[str, Array],
    attributes: Mapping[str, Any],
    codec: Compression,
    positions: int,
    pages: Mapping[str, int] | None = None,
) -> bytes:
    """The object. arrays: by their path in the group, sorted into it by name; attributes: JSON.

    positions: of the shard; about as many numbers of an array share their statistics.
    pages: other numbers of them, by the array's name; such an array's neighbours have nothing in common.
    """
    if (size := sum(array.nbytes for array in arrays.values())) > LARGEST:
        raise CacheError(f"got {size} bytes of streams; expected at most {LARGEST}. Make the shards smaller.")
    buffer = io.BytesIO()
    sizes: dict[str, int] = {}
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for folder in sorted({name.rpartition("/")[0] for name in arrays} - {""}):
            _add(archive, f"{folder}/zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": {}})
        for name in sorted(arrays):
            array = np.ascontiguousarray(arrays[name])
            codecs, data = _compressed(name, array, codec, positions, (pages or {}).get(name))
            shape = [max(size, 1) for size in array.shape]
            meta = {
                "zarr_format": 3,
                "node_type": "array",
                "shape": list(array.shape),
                "data_type": array.dtype.name,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape}},
                "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
                "fill_value": False if array.dtype.kind == "b" else 0.0 if array.dtype.kind == "f" else 0,
                "codecs": codecs,
                "attributes": {},
            }
            _add(archive, f"{name}/zarr.json", meta)
            if array.size:
                sizes[name] = len(data)
                _add(archive, f"{name}/c/" + "/".join("0" * array.ndim), data)
        # last, so that the end of the object tells everything about it
        own = {"fastkd": {**attributes, "bytes": sizes}}
        _add(archive, _ATTRIBUTES, {"zarr_format": 3, "node_type": "group", "attributes": own})
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
    found = re.fullmatch(SEAL + b"([0-9a-f]{64})", data[-HASH_LENGTH - len(SEAL) :])
    if found is None:
        raise Damage("it does not end in a shard's hash: it is truncated, or not a shard")
    return found[1].decode()


def read_attributes(end: bytes) -> dict[str, Any]:
    """The attributes, from the last TAIL_LENGTH bytes of an object. Damage if they are incomplete."""
    stored_digest(end)
    members = _directory(end)
    if _ATTRIBUTES not in members:
        raise Damage("it has no zarr.json")
    try:
        attributes = parse_json(bytes(_member(end, members[_ATTRIBUTES], check=True)), _ATTRIBUTES).get("attributes")
    except CacheError as error:
        raise Damage(str(error)) from error
    own = attributes.get("fastkd") if isinstance(attributes, dict) else None
    if not isinstance(own, dict):
        raise Damage("its zarr.json has no member `fastkd` in its attributes")
    return own


def check_bytes(data: bytes) -> bytes:
    """The object itself. Damage, naming the array, if it differs from the hash it ends in."""
    if stored_digest(data) == digest(data):
        return data
    try:
        members(data)
    except Damage as damage:
        if damage.array:
            raise Damage("its bytes differ from its sha256", damage.array) from damage
    raise Damage("its bytes differ from its sha256 (in its zip headers or the hash itself)")


def unpack(
    data: bytes, known: Mapping[str, Expected | None], streams: Workspace | None = None, *, check: bool = False
) -> dict[str, Array]:
    """The arrays of an object whose bytes were checked. Damage, naming the array, if one cannot be read.

    known: the arrays to read, and what each may be (None: anything); others are skipped. An array is compared with it
    before its memory is allocated. streams: memory for all but the inputs and the lengths, which the caller keeps.
    check: compare the members with their CRC-32, for the end of an object, whose hash covers the whole.
    """
    members = _directory(data)
    arrays: dict[str, Array] = {}
    left = LARGEST
    for name, expected in known.items():
        path = f"{name}/zarr.json"
        if path not in members:
            continue
        try:
            meta = parse_json(bytes(_member(data, members[path], check=check)), path)
            shape, dtype, codecs = _array_meta(meta, expected)
            if (left := left - prod(shape) * dtype.itemsize) < 0:
                raise ValueError(f"got shape {shape}; more than a shard can hold")
            own = streams is None or name.startswith("inputs/") or name.endswith("_lengths")
            out = np.empty(shape, dtype) if own or streams is None else streams.array(name, shape, dtype)
            if out.size:
                chunk = members.get(f"{name}/c/" + "/".join("0" * len(shape)))
                if chunk is None:
                    raise ValueError("its chunk is missing")
                _decompress(_member(data, chunk, check=check), out.reshape(-1), codecs)
            arrays[name] = out
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


def members(data: bytes) -> dict[str, bytes]:
    """The members of an object, by name. Damage if its zip directory is invalid, or a member is damaged."""
    return {name: bytes(_member(data, member, check=True)) for name, member in _directory(data).items()}


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


def _compressed(
    name: str, array: Array, codec: Compression, positions: int, page: int | None
) -> tuple[list[dict[str, Any]], bytes]:
    """Codecs of an array, and its compressed bytes."""
    if array.dtype.name not in TYPES:
        raise CacheError(f"got an array of {array.dtype}; expected one of {', '.join(TYPES)}.")
    flat = array.astype(array.dtype.newbyteorder("<"), copy=False).reshape(-1)
    choices: list[tuple[list[dict[str, Any]], bytes]] = []
    if codec.compressor == "pcodec" and array.dtype.name not in _NOT_BY_PCODEC:
        # The streams are differences already: order 0 in every version of pcodec.
        plain = array.dtype.kind == "u" or page is not None
        delta = {"delta_spec": "try_consecutive", "delta_encoding_order": 0} if plain else {}
        page = page or min(max(positions, _PAGE[0]), _PAGE[1])
        options = {"level": codec.level, "mode_spec": "classic", **delta, "equal_pages_up_to": page}
        data = bytes(PCodec(**options).encode(flat)) if array.size else b""
        choices.append(([{"name": "numcodecs.pcodec", "configuration": options}], data))
    if not choices or name.startswith("inputs/"):  # both for inputs: text has repetitions
        options = {"level": codec.level if codec.compressor == "zstd" else 9, "checksum": True}
        data = bytes(Zstd(**options).encode(flat.view(np.uint8))) if array.size else b""
        endian = {"name": "bytes", "configuration": {"endian": "little"}}
        choices.append(([endian, {"name": "zstd", "configuration": options}], data))
    return min(choices, key=lambda choice: len(choice[1]))


def _array_meta(
    meta: dict[str, Any], expected: Expected | None
) -> tuple[tuple[int, ...], np.dtype[Any], list[dict[str, Any]]]:
    """Shape, type and codecs in the metadata of an array. ValueError if they are not as expected."""
    shape, name, codecs = meta.get("shape"), meta.get("data_type"), meta.get("codecs")
    if type(meta.get("zarr_format")) is not int or meta["zarr_format"] != 3 or meta.get("node_type") != "array":
        raise ValueError("it is not a Zarr v3 array")
    if not isinstance(shape, list) or not 1 <= len(shape) <= 2 or not all(type(s) is int and s >= 0 for s in shape):
        raise ValueError(f"got shape {shape!r}; expected one or two sizes")
    types, sizes = expected or (TYPES, tuple(range(LARGEST) for _ in shape))
    if not isinstance(name, str) or name not in types:
        raise ValueError(f"got type {name!r}; expected {' or '.join(types)}")
    if len(shape) != len(sizes) or not all(s in some for s, some in zip(shape, sizes, strict=True)):
        wanted = ", ".join(str(some[0]) if len(some) == 1 else f"{some[0]} to {some[-1]}" for some in sizes)
        raise ValueError(f"got shape {shape}; expected [{wanted}]: a shard holds no more, or no less")
    if not isinstance(codecs, list) or not all(isinstance(codec, dict) for codec in codecs):
        raise ValueError(f"got codecs {codecs!r}")
    names, dtype = [codec.get("name") for codec in codecs], np.dtype(name)
    if names != ["numcodecs.pcodec"] and names != ["bytes", "zstd"]:
        raise ValueError(f"got codecs {codecs!r}; expected numcodecs.pcodec, or bytes and zstd")
    if names[0] == "bytes" and dtype.itemsize > 1 and _setting(codecs[0], "endian") != "little":
        raise ValueError(f"got codecs {codecs!r}; expected little-endian bytes")
    if _setting(meta.get("chunk_grid"), "chunk_shape") != [max(s, 1) for s in shape]:
        raise ValueError(f"got chunk grid {meta.get('chunk_grid')!r}; expected one chunk of the array's shape")
    if _setting(meta.get("chunk_key_encoding"), "separator") not in (None, "/") or meta.get("storage_transformers"):
        raise ValueError("expected the default chunk key encoding, and no storage transformers")
    return tuple(shape), dtype.newbyteorder("<"), codecs


def _setting(of: Any, name: str) -> Any:
    """A member of the configuration of a codec or a chunk grid; None if it is missing."""
    configuration = of.get("configuration") if isinstance(of, dict) else None
    return configuration.get(name) if isinstance(configuration, dict) else None


def _add(archive: zipfile.ZipFile, name: str, content: bytes | dict[str, Any]) -> None:
    if isinstance(content, dict):
        content = json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
    info = zipfile.ZipInfo(name, _DATE)
    info.external_attr = 0o644 << 16
    info.create_system = 3
    archive.writestr(info, content)


def _directory(end: bytes | memoryview) -> dict[str, zipfile.ZipInfo]:
    """The members in the directory at the end of an object: stored, distinct. Offsets are relative to `end`."""
    try:
        with zipfile.ZipFile(io.BytesIO(end)) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, struct.error, NotImplementedError, OverflowError) as error:
        raise Damage(f"its zip directory is damaged ({error})") from error
    found: dict[str, zipfile.ZipInfo] = {}
    for member in members:
        if member.compress_type or member.flag_bits & 1 or member.file_size != member.compress_size:
            raise Damage(f"its member {member.filename!r} is compressed or encrypted")
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
        array = member.filename.partition("/c/")[0].removesuffix("/zarr.json")
        raise Damage(f"its member {member.filename!r} is damaged", None if array == _ATTRIBUTES else array)
    return data
