"""A slow reader of fastkd caches by cache/FORMAT.md, from zarr, numpy and pyarrow, without fastkd."""

import hashlib
import json
from math import inf, isnan
from pathlib import Path
from struct import pack
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import zarr
from zarr.storage import ZipStore

FEATURES = {"rows", "draws", "ties", "contexts", "pcodec", "zstd"}
NO_TAIL = -(2**31)


def read_spec(cache: Path, form: str = "fastkd-cache") -> tuple[dict[str, Any], str]:
    """The settings, and their hash. cache: its folder, or that of a feature (form "fastkd-feature")."""
    document = json.loads((cache / "spec.json").read_text())
    assert document["format"] == form
    assert document["version"] == 1
    assert set(document["required"]) <= (FEATURES if form == "fastkd-cache" else {"hidden", "pcodec"})
    hashed = {**document["spec"], "notes": ""}
    text = json.dumps(hashed, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    assert hashlib.sha256(text.encode("ascii")).hexdigest() == document["sha256"]
    return document["spec"], document["sha256"]


def read_manifest(cache: Path, spec_hash: str) -> list[dict[str, Any]]:
    """The rows of manifest.parquet, its hash checked."""
    table = pq.read_table(cache / "manifest.parquet")
    assert table.schema.metadata[b"fastkd.spec"].decode() == spec_hash
    total = hashlib.sha256(spec_hash.encode("ascii"))
    for name in table.column_names:
        values = table.column(name).to_pylist()
        total.update(f"{name}:{len(values)};".encode("ascii"))
        if name == "attempt":
            total.update("\0".join(values).encode())
        elif name.endswith("_sha256"):
            total.update(b"".join(values))
        elif name.startswith(("mass_", "entropy_")):
            total.update(b"".join(pack("<d", float("nan") if v is None else v) for v in values))
        else:
            total.update(b"".join(pack("<q", v) for v in values))
    assert table.schema.metadata[b"fastkd.sha256"].decode() == total.hexdigest()
    return table.to_pylist()


def open_shard(cache: Path, index: int, spec_hash: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The attributes and the arrays of a shard, both of its hashes checked. cache: its folder, or that of a feature."""
    attributes, arrays = open_object(cache / f"shards/{index}.zarr.zip")
    assert (attributes["format"], attributes["spec"], attributes["index"]) == (1, spec_hash, index)
    return attributes, arrays


def open_object(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The attributes and the arrays of a sealed zip, both of its hashes checked."""
    data = path.read_bytes()
    assert data[-78:-64] == b"fastkd-sha256:"
    assert data[-64:].decode("ascii") == hashlib.sha256(data[:-64]).hexdigest()
    group = zarr.open_group(ZipStore(path, mode="r"), mode="r")
    attributes = group.attrs["fastkd"]
    arrays = {name: node[...] for name, node in group.members(max_depth=None) if isinstance(node, zarr.Array)}
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        total.update(f"{name}:{array.dtype.name}:{','.join(str(s) for s in array.shape)};".encode("ascii"))
        total.update(array.astype(array.dtype.newbyteorder("<")).tobytes(order="C"))
    assert attributes["content"] == total.hexdigest()
    return attributes, arrays


def rows_of(counts: list[int], arrays: dict[str, list[int]], ties: bool) -> list[list[tuple[int, int, int]]]:
    """(value code, rank, repeats) of every entry of every row, from values, firsts, ties and (maybe) repeats."""
    longest_first = sorted(range(len(counts)), key=lambda i: -counts[i])  # stable
    rows: list[list[tuple[int, int, int]]] = [[] for _ in counts]
    value = first = tie = 0
    for place in range(max(counts, default=0)):
        for i in longest_first:
            if counts[i] <= place:
                continue
            difference = arrays["values"][value]
            code = difference + (rows[i][-1][0] if place else 0)
            if ties and place and difference == 0:
                rank = rows[i][-1][1] + 1 + arrays["ties"][tie]
                tie += 1
            else:
                rank = arrays["firsts"][first]
                first += 1
            rows[i].append((code, rank, arrays["repeats"][value] if "repeats" in arrays else 0))
            value += 1
    assert (value, first, tie) == tuple(len(arrays[name]) for name in ("values", "firsts", "ties"))
    return rows


def read_part(
    part: str, spec: dict[str, Any], arrays: dict[str, np.ndarray]
) -> list[list[tuple[int, np.float32, int]]]:
    """(id, log-probability, repeats) of every entry of every row of the head or of the drawn entries."""
    stream = {name.removeprefix(f"{part}/"): array for name, array in arrays.items() if name.startswith(f"{part}/")}
    plain = {name: array.tolist() for name, array in stream.items()}
    vocabulary = range(spec["vocab_size"])
    order = sorted(vocabulary, key=lambda i: (-plain["classes"][i], i))
    lists: dict[int, list[int]] = {}
    width = 0
    if spec["codec"]["contexts"]:
        coded = {name: plain[f"context_{name}"] for name in ("values", "firsts", "ties")}
        listed = rows_of(plain["context_counts"], coded, ties=True)
        for token, row in zip(plain["context_tokens"], listed, strict=True):
            lists[token] = [order[rank] for _, rank, _ in row]
        width = max(plain["context_counts"], default=0)
    rows = []
    for i, row in enumerate(rows_of(plain["counts"], plain, spec["codec"]["sort_ties"])):
        entries = []
        for code, rank, repeats in row:
            token_id = lists[int(arrays["inputs/tokens"][i])][rank] if rank < width else order[rank - width]
            entries.append((token_id, stream["grid"][code], repeats))
        rows.append(entries)
    return rows


def read_shard(cache: Path, index: int) -> dict[str, np.ndarray]:
    """The arrays that FORMAT.md says a shard means, under the names that fastkd gives them."""
    spec, spec_hash = read_spec(cache)
    return decode(spec, *open_shard(cache, index, spec_hash))


def decode(spec: dict[str, Any], attributes: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays that a shard means, from its streams. Raises whatever it stumbles over."""
    n, vocabulary, temperatures = attributes["positions"], spec["vocab_size"], spec["temperatures"]
    head = read_part("head", spec, arrays) if spec["k"] else [[] for _ in range(n)]
    draws = read_part("draws", spec, arrays) if spec["draws"] else [[] for _ in range(n)]
    width = min(spec["k"], vocabulary) + spec["draws"]
    decoded = {
        "ids": np.zeros((n, width), np.int32),
        "logprobs": np.full((n, width), -inf, np.float32),
        "draws": np.zeros((n, width), np.int32),
        "tail": np.full((n, len(temperatures)), -inf, np.float32),
        "outcomes": np.zeros(n, np.int32),
    }
    for i in range(n):
        for place, (token_id, logprob, repeats) in enumerate(head[i] + draws[i]):
            decoded["ids"][i, place] = token_id
            decoded["logprobs"][i, place] = logprob
            decoded["draws"][i, place] = repeats + 1 if place >= len(head[i]) else 0
        code = 0
        for m in range(len(temperatures)):
            code += int(arrays["tail"][m, i])
            if int(arrays["tail"][0, i]) != NO_TAIL:
                decoded["tail"][i, m] = np.float32(code * spec["codec"]["tail_step"])
        decoded["outcomes"][i] = arrays["outcomes"][i] if "outcomes" in arrays else vocabulary - len(head[i])
    if not spec["draws"]:
        del decoded["draws"]
    for name in spec["inputs"]:
        decoded[name] = arrays[f"inputs/{name}"]
    for name in ("sequence_lengths", "document_lengths"):
        if name in arrays:
            decoded[name] = arrays[name]
            assert int(arrays[name].sum()) == n
    assert attributes["sequences"] == len(decoded["sequence_lengths"])
    decoded["first_sequence"] = np.array(attributes["first_sequence"], np.int64)
    used = decoded["logprobs"] > -inf
    assert attributes["counted"] == int(used.any(axis=1).sum())
    assert attributes["head_entries"] == sum(map(len, head))
    assert attributes["draw_entries"] == sum(map(len, draws))
    assert not any(isnan(x) for x in decoded["logprobs"].flat)
    return decoded


def check_values(spec: dict[str, Any], decoded: dict[str, np.ndarray]) -> None:
    """AssertionError for decoded targets that FORMAT.md does not allow ("For writers", Checks; Outcomes; Tails)."""
    vocabulary = spec["vocab_size"]
    draws = decoded.get("draws", np.zeros_like(decoded["ids"]))
    for i, logprobs in enumerate(decoded["logprobs"].tolist()):
        used = [x > -inf for x in logprobs]
        count, head = sum(used), sum(u and d == 0 for u, d in zip(used, draws[i].tolist(), strict=True))
        assert used == [True] * count + [False] * (len(used) - count), "unused entries are last"
        ids, drawn = decoded["ids"][i, :count].tolist(), draws[i, head:count].tolist()
        assert len(set(ids)) == count, "ids are distinct"
        assert all(0 <= token_id < vocabulary for token_id in ids)
        for some in (logprobs[:head], logprobs[head:count]):
            assert some == sorted(some, reverse=True), "entries are sorted by falling log-probability"
        assert all(-32768 - 8 <= x <= 0 for x in logprobs[:count])
        assert head <= spec["k"]
        assert all(d >= 1 for d in drawn)
        assert sum(drawn) <= spec["draws"]
        tail, outcomes = decoded["tail"][i].tolist(), int(decoded["outcomes"][i])
        absent = [x == -inf for x in tail]
        assert all(absent) or not any(absent), "a tail is finite at all temperatures, or at none"
        assert len(drawn) <= outcomes <= vocabulary - head
        assert outcomes >= 1 or all(absent)
        assert count or (all(absent) and outcomes == vocabulary), "a row that does not count has no tail"
    if "tokens" in decoded:
        assert decoded["tokens"].dtype.kind in "iu"
        assert all(0 <= token < 2**31 for token in decoded["tokens"].tolist())
    for name in ("sequence_lengths", "document_lengths"):
        assert all(length >= 1 for length in decoded.get(name, np.ones(1)).tolist())


def read_feature(cache: Path, name: str, index: int) -> dict[str, np.ndarray]:
    """The arrays that FORMAT.md says a shard of a feature means, by the names that fastkd gives them; and `states`."""
    folder = cache / "features" / quoted(name)
    spec, spec_hash = read_spec(folder, "fastkd-feature")
    assert spec["name"] == name
    assert spec["base"] == read_spec(cache)[1]
    basis_attributes, basis = open_object(folder / "basis.zarr.zip")
    assert basis_attributes["content"] == spec["basis"]
    if spec["block"] is not None:
        assert hashlib.sha256((folder / "block.safetensors").read_bytes()).hexdigest() == spec["block"]
    attributes, arrays = open_shard(folder, index, spec_hash)
    base, _ = open_shard(cache, index, spec["base"])
    assert (attributes["base"], attributes["positions"]) == (base["content"], base["positions"])
    return decode_feature(spec, basis, attributes, arrays)


def quoted(name: str) -> str:
    """A name as that of a folder."""
    plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-~"
    return "".join(chr(b) if chr(b) in plain else f"%{b:02X}" for b in name.encode())


def ascending(gaps: np.ndarray, below: int) -> list[int]:
    """The numbers that gaps stand for."""
    numbers = [-1]
    for gap in gaps.tolist():
        numbers.append(numbers[-1] + 1 + gap)
    assert numbers[-1] < below
    return numbers[1:]


def decode_feature(
    spec: dict[str, Any], basis: dict[str, np.ndarray], attributes: dict[str, Any], arrays: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The arrays that a shard of a feature means, from its streams. Raises whatever it stumbles over."""
    shape, n, m = spec["shape"], attributes["positions"], attributes["vectors"]
    pixels, width = (shape[1] * shape[2], shape[0]) if spec["kind"] == "map" else (1, int(np.prod(shape)))
    assert arrays["codes"].shape == ((width + 3) // 4, 4 * m)
    assert arrays["codes"].dtype == np.int16
    assert arrays["scale"].shape == (m,)
    assert arrays["scale"].dtype == np.float16
    positions = list(range(n)) if spec["positions"] == "all" else ascending(arrays["rows"], n)
    rows = [position * pixels + pixel for position in positions for pixel in range(pixels)]
    assert len(rows) == m
    exact_rows = ascending(arrays["exact_rows"], m)
    exact = arrays["exact"]
    if spec["dtype"] == "bfloat16":
        assert exact.dtype == np.uint16
        exact = np.frombuffer(b"".join(b"\0\0" + pack("<H", bits) for bits in exact.ravel().tolist()), "<f4")
    else:
        assert exact.dtype == spec["dtype"]
    exact = exact.astype(np.float32).reshape(len(exact_rows), width)
    assert np.isfinite(exact).all()
    assert np.isfinite(arrays["scale"]).all()
    mean, vectors = basis["mean"].astype(np.float64), basis["basis"].astype(np.float64)
    codes = np.array([[arrays["codes"][c // 4, 4 * i + c % 4] for c in range(width)] for i in range(m)], np.int16)
    codes = codes.reshape(m, width)
    z = codes.astype(np.float64) * spec["step"] + mean @ vectors
    scale = arrays["scale"].astype(np.float64)
    states = scale[:, None] * (z @ vectors.T)
    for i, row in enumerate(exact_rows):
        x = exact[i].astype(np.float64)
        scale[row] = np.sqrt((x**2).mean())
        z[row] = (x / scale[row] if scale[row] else 0 * x) @ vectors
        states[row] = x
    return {
        "codes": codes,
        "scale": scale.astype(np.float32),
        "exact_rows": np.array(exact_rows, np.int64),
        "exact": exact,
        "rows": np.array(rows, np.int64),
        "coordinates": z,
        "states": states,
    }


def check_feature_values(
    spec: dict[str, Any], basis: dict[str, np.ndarray], arrays: dict[str, np.ndarray], decoded: dict[str, np.ndarray]
) -> None:
    """AssertionError for a shard that no writer writes ("For writers of features")."""
    exact = set(decoded["exact_rows"].tolist())
    for i, (codes, scale) in enumerate(
        zip(decoded["codes"].tolist(), arrays["scale"].astype(float).tolist(), strict=True)
    ):
        if i in exact:
            assert not any(codes)
            assert pack("<d", scale) == pack("<d", 0.0)
        else:
            assert all(abs(code) <= 32767 for code in codes)
            assert 2**-14 <= scale <= 65504
            assert basis["scale"][0] / 8 <= scale <= basis["scale"][0] * 8
