"""cache/FORMAT.md is enough to read a cache: what a reader made from it finds is what fastkd finds."""

import io
import json
import re
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import plain_reader
import pytest
from cache_cases import unpacked
from hypothesis import given, settings
from test_codec import CALLS, caches

from fastkd.cache import (
    CODECS,
    Basis,
    CacheError,
    CacheSpec,
    Codec,
    CorruptShard,
    FeatureSpec,
    checks,
    create_cache,
    create_feature,
    encode_hidden,
    open_cache,
    target_shards,
)
from fastkd.cache.shard import container as shardfile

FORMAT = Path(__file__).parents[2] / "cache" / "FORMAT.md"
# zarr warns of pcodec, whose codec is not in the core of Zarr v3
pytestmark = pytest.mark.filterwarnings(
    "ignore:Numcodecs codecs are not in the Zarr version 3 specification:UserWarning"
)


def targets(
    rng: np.random.Generator, n: int, vocab_size: int, k: int, draws: int, *, ragged: bool = False
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Rows of a teacher whose answer hangs on the token, as `write_shard` takes them; and the tokens."""
    tokens = rng.integers(0, 6, n).astype(np.int32)
    logits = rng.normal(size=(6, vocab_size))[tokens] * 2.5 + rng.normal(size=(n, vocab_size)) * 0.3
    logits = np.round(logits * 4) / 4  # ties
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    order = np.argsort(-logprobs, axis=1, kind="stable")
    width = min(k, vocab_size) + draws
    arrays = {
        "ids": np.zeros((n, width), np.int64),
        "logprobs": np.full((n, width), -np.inf, np.float32),
        "tail": np.full((n, 3), -np.inf, np.float32),
        "draws": np.zeros((n, width), np.int64),
    }
    for i in range(n):
        head = int(rng.integers(0, k + 1)) if ragged else k
        if ragged and i % 5 == 2:
            continue  # a row that does not count
        chosen, rest = order[i, :head], order[i, head:]
        drawn, times = np.unique(rng.integers(0, len(rest), draws), return_counts=True)
        row = np.concatenate([chosen, rest[drawn]])
        arrays["ids"][i, : len(row)] = row
        arrays["logprobs"][i, : len(row)] = logprobs[i, row]
        arrays["draws"][i, head : len(row)] = times
        arrays["tail"][i] = [np.log(np.exp(logprobs[i, rest] / t).sum()) for t in (1.0, 2.0, 4.0)]
    if not draws:
        del arrays["draws"]
    return arrays, tokens


def same(cache: Path, index: int = 0) -> None:
    """The plain reader and fastkd agree about a shard, to the bit."""
    expected, found = open_cache(cache).read_shard(index), plain_reader.read_shard(cache, index)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def spec_of(codec: Codec | str, **fields: Any) -> CacheSpec:
    return CacheSpec(**{"vocab_size": 60, "k": 5, "codec": codec, "temperatures": (1.0, 2.0, 4.0)} | fields)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("draws", [0, 4])
@pytest.mark.parametrize("ragged", [False, True])
def test_settings(tmp_path: Path, codec: str, draws: int, ragged: bool) -> None:
    arrays, tokens = targets(np.random.default_rng(1), 97, 60, 5, draws, ragged=ragged)
    with create_cache(tmp_path, spec_of(codec, draws=draws)) as writer:
        writer.write_shard(0, {"tokens": tokens}, **arrays)
    if codec == "smallest":
        streams = open_cache(tmp_path).zarr_group(0)
        assert "head/context_counts" in streams
        assert streams["head/context_tokens"].size > 2
    same(tmp_path)


@given(caches())
@settings(CALLS, max_examples=60)
def test_any_cache(drawn: Any) -> None:
    spec, arrays, tokens = drawn
    with tempfile.TemporaryDirectory() as folder:
        with create_cache(folder, spec) as writer:
            writer.write_shard(0, {"tokens": tokens}, **arrays)
        same(Path(folder))


def test_draws_alone_and_ties_without_order(tmp_path: Path) -> None:
    arrays, tokens = targets(np.random.default_rng(2), 50, 60, 0, 7)
    codec = replace(CODECS["smallest"], sort_ties=False, compressor="zstd")
    with create_cache(tmp_path, spec_of(codec, k=0, draws=7)) as writer:
        writer.write_shard(0, {"tokens": tokens}, **arrays)
    same(tmp_path)


def test_everything_else(tmp_path: Path) -> None:
    """Outcomes, lengths, inputs of many types, a second shard, rows that do not count, and a manifest."""
    spec = spec_of(
        "default", inputs=("tokens", "loss_mask", "weight", "byte", "far"), notes="ä note", teacher="τ\n\x7f"
    )
    rng = np.random.default_rng(3)
    with create_cache(tmp_path, spec) as writer:
        for index, n in ((3, 11), (20, 1)):
            arrays, tokens = targets(rng, n, 60, 5, 0, ragged=index == 3)
            inputs = {
                "tokens": tokens.astype(np.uint32),
                "loss_mask": np.arange(n) % 2 == 0,
                "weight": rng.normal(size=n).astype(np.float16),
                "byte": np.arange(n, dtype=np.int8) - 5,
                "far": np.arange(n, dtype=np.int64) * -(2**40),
            }
            lengths = {"sequence_lengths": [4, n - 4] if n > 4 else None}
            if n > 4:
                lengths["document_lengths"] = [1, 9, 1]
            writer.write_shard(index, inputs, **arrays, outcomes=41, **lengths, first_sequence=index * 2)
        empty = {
            "ids": np.zeros((3, 0), np.int32),
            "logprobs": np.zeros((3, 0), np.float32),
            "tail": np.zeros((3, 3), np.float32),
        }
        nothing = {name: np.zeros(3, array.dtype) for name, array in inputs.items()}
        writer.write_shard(21, nothing, **empty, first_sequence=100)
        writer.seal()
    for index in (3, 20, 21):
        same(tmp_path, index)
    rows = plain_reader.read_manifest(tmp_path, spec.hash)
    assert [row["shard"] for row in rows] == [3, 20, 21]
    assert rows[2]["mass_mean"] is None
    for row in rows:
        attributes, _ = plain_reader.open_shard(tmp_path, row["shard"], spec.hash)
        assert row["content_sha256"].hex() == attributes["content"]
        data = (tmp_path / f"shards/{row['shard']}.zarr.zip").read_bytes()
        assert (row["bytes"], row["object_sha256"].hex()) == (len(data), data[-64:].decode())
        for name in ("first_sequence", "sequences", "positions", "counted", "head_entries", "draw_entries"):
            assert row[name] == attributes[name]
        for what in ("mass", "entropy"):
            assert [row[f"{what}_{which}"] for which in ("mean", "p05", "p50", "p95")] == attributes["statistics"][what]


def test_the_example(tmp_path: Path) -> None:
    """The numbers of FORMAT.md's example are those that fastkd writes."""
    text = FORMAT.read_text()
    blocks = re.findall(r"```json example=(\w+)\n(.*?)```", text, re.DOTALL)
    example = {name: json.loads(block) for name, block in blocks}
    spec = CacheSpec(**{**example["spec"], "codec": Codec(**example["spec"]["codec"])})
    given = example["given"]
    logprobs = np.log(np.array(given["probabilities"], np.float32))
    tail = np.log(np.array(given["tail_probabilities"], np.float32))[:, None]
    with create_cache(tmp_path, spec) as writer:
        writer.write_shard(0, {"tokens": np.array(given["tokens"], np.int32)}, np.array(given["ids"]), logprobs, tail)
    attributes, arrays = plain_reader.open_shard(tmp_path, 0, spec.hash)
    assert spec.hash == example["hashes"]["spec"]
    assert attributes["content"] == example["hashes"]["content"]
    assert arrays.keys() == example["streams"].keys()
    for name, array in arrays.items():
        assert [array.dtype.name, *array.shape] == example["streams"][name][0], name
        np.testing.assert_allclose(array, example["streams"][name][1], atol=5e-5, err_msg=name)
    decoded = plain_reader.read_shard(tmp_path, 0)
    for name, values in example["decoded"].items():
        np.testing.assert_allclose(decoded[name], values, atol=5e-5, err_msg=name)
    same(tmp_path)


def test_the_example_of_a_feature(tmp_path: Path) -> None:
    test_the_example(tmp_path)
    blocks = re.findall(r"```json example=feature_?(\w*)\n(.*?)```", FORMAT.read_text(), re.DOTALL)
    example = {name: json.loads(block) for name, block in blocks}
    given, settings = example["given"], example[""]
    basis = Basis(np.array(given["mean"]), np.array(given["basis"]), given["scale"])
    spec = FeatureSpec(**settings | {"shape": tuple(settings["shape"])})
    coded = encode_hidden(np.array(given["states"], np.float32), basis, spec.step)
    with create_feature(tmp_path, spec, basis) as writer:
        writer.write_shard(0, coded, np.array(given["rows"]))
    attributes, arrays = plain_reader.open_shard(tmp_path / "features/1", 0, spec.hash)
    assert spec.hash == example["hashes"]["spec"]
    assert attributes["content"] == example["hashes"]["content"]
    assert arrays.keys() == example["streams"].keys()
    for name, array in arrays.items():
        assert [array.dtype.name, *array.shape] == example["streams"][name][0], name
        np.testing.assert_allclose(array, example["streams"][name][1], atol=5e-5, err_msg=name)
    decoded = plain_reader.read_feature(tmp_path, "1", 0)
    for name, values in example["decoded"].items():
        np.testing.assert_allclose(decoded[name], values, atol=5e-5, err_msg=name)


# What a reader refuses, and a writer


def write_one(cache: Path, spec: CacheSpec, **fields: Any) -> None:
    arrays, tokens = targets(np.random.default_rng(4), 80, 60, spec.k, spec.draws, ragged=True)
    inputs = dict.fromkeys(spec.inputs, tokens)
    with create_cache(cache, spec) as writer:
        writer.write_shard(**{"index": 0, "inputs": inputs} | arrays | fields)


def forge(cache: Path, arrays: dict[str, np.ndarray], **attributes: Any) -> None:
    """Put other arrays or attributes into shard 0, under a hash that is right."""
    path = cache / "shards/0.zarr.zip"
    old_attributes, old = unpacked(path.read_bytes())
    spec = open_cache(cache).spec
    path.write_bytes(shardfile.pack(old | arrays, old_attributes | attributes, spec.settings, 80))


def edit(cache: Path, member: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change one zarr.json of shard 0, under a hash that is right."""
    path = cache / "shards/0.zarr.zip"
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name == member:
                document = json.loads(data)
                change(document)
                data = json.dumps(document).encode()
            new.writestr(name, data)
        new.comment = shardfile.SEAL + b"0" * 64
    data = buffer.getvalue()
    path.write_bytes(data[:-64] + shardfile.digest(data).encode())


def code_too_high(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"head/grid": arrays["head/grid"][:-1]}


def rank_too_high(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    firsts = arrays["head/firsts"].copy()
    firsts[0] = 60 + arrays["head/context_counts"].max()
    return {"head/firsts": firsts}


def rank_beyond_its_list(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A token of no list in a row whose first rank is a place in a list."""
    return {"inputs/tokens": np.full_like(arrays["inputs/tokens"], 2**30)}


def list_beyond_the_order(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"head/context_firsts": arrays["head/context_firsts"] + np.uint16(1000)}


def lists_out_of_order(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"head/context_tokens": arrays["head/context_tokens"][::-1]}


def empty_list(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"head/context_counts": arrays["head/context_counts"] * 0}


def rising_grid(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"head/grid": arrays["head/grid"][::-1]}


def endless_grid(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"head/grid": np.where(arrays["head/grid"] < -1, -np.inf, arrays["head/grid"])}


def short_classes(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"head/classes": arrays["head/classes"][:-1]}


def too_many_entries(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"head/counts": np.full_like(arrays["head/counts"], 6)}


def too_few_values(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"head/values": arrays["head/values"][1:]}


def too_few_positions(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"tail": arrays["tail"][:, 1:]}


def other_lengths(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"sequence_lengths": arrays["sequence_lengths"] + np.uint32(1)}


@pytest.mark.parametrize(
    "lie",
    [
        code_too_high,
        rank_too_high,
        rank_beyond_its_list,
        list_beyond_the_order,
        lists_out_of_order,
        empty_list,
        rising_grid,
        endless_grid,
        short_classes,
        too_many_entries,
        too_few_values,
        too_few_positions,
        other_lengths,
    ],
)
def test_arrays_that_contradict_each_other(tmp_path: Path, lie: Callable[..., dict[str, np.ndarray]]) -> None:
    write_one(tmp_path, spec_of("smallest"))
    _, arrays = unpacked((tmp_path / "shards/0.zarr.zip").read_bytes())
    forge(tmp_path, {})
    open_cache(tmp_path).read_shard(0)
    forge(tmp_path, lie(arrays))
    with pytest.raises(CorruptShard, match="shard 0"):
        open_cache(tmp_path).read_shard(0)


@pytest.mark.parametrize("attributes", [{"format": 2}, {"spec": "0" * 64}, {"index": 1}, {"positions": 79}])
def test_attributes_of_another_shard(tmp_path: Path, attributes: dict[str, Any]) -> None:
    write_one(tmp_path, spec_of("default"))
    forge(tmp_path, {}, **attributes)
    with pytest.raises(CorruptShard, match="shard 0"):
        open_cache(tmp_path).read_shard(0)


@pytest.mark.parametrize(
    "change",
    [
        lambda meta: meta["codecs"][0]["configuration"].update(endian="big"),
        lambda meta: meta["codecs"].insert(0, {"name": "transpose", "configuration": {"order": [1, 0]}}),
        lambda meta: meta["chunk_grid"]["configuration"].update(chunk_shape=[1, 80]),
        lambda meta: meta.update(data_type="float64"),
        lambda meta: meta.update(data_type="object"),
        lambda meta: meta.update(shape=[3, 2**40]),
        lambda meta: meta.update(shape=[3, 79]),
        lambda meta: meta.update(zarr_format=2),
    ],
)
def test_metadata_that_a_reader_does_not_take(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    write_one(tmp_path, spec_of("portable"))
    edit(tmp_path, "tail/zarr.json", lambda meta: None)
    open_cache(tmp_path).read_shard(0)
    edit(tmp_path, "tail/zarr.json", change)
    with pytest.raises(CorruptShard, match=r'shard 0.*"tail"'):
        open_cache(tmp_path).read_shard(0)


@pytest.mark.parametrize(
    ("member", "value"),
    [
        (("version",), 2),
        (("format",), "another"),
        (("required",), ["rows", "holograms"]),
        (("sha256",), "0" * 64),
        (("spec", "vocab_size"), 8.5),
        (("spec", "draw_temperature"), 10**400),
        (("spec", "unheard_of"), 1),
        (("spec", "codec", "growth"), None),
        (("spec", "codec", "growth"), 1e-9),
        (("spec", "codec", "step"), [1]),
        (("spec", "temperatures"), [1.0] * 65),
    ],
)
def test_settings_that_a_reader_does_not_take(tmp_path: Path, member: tuple[str, ...], value: Any) -> None:
    write_one(tmp_path, spec_of("default"))
    document = json.loads((tmp_path / "spec.json").read_text())
    place = document
    for name in member[:-1]:
        place = place[name]
    place[member[-1]] = value
    (tmp_path / "spec.json").write_text(json.dumps(document))
    with pytest.raises(CacheError, match=r"spec\.json|codec|temperature|vocab_size"):
        open_cache(tmp_path)


def test_settings_with_integers_for_numbers_have_the_same_hash(tmp_path: Path) -> None:
    one = CacheSpec(8, 2, draw_temperature=1, temperatures=(1, 2), codec=Codec(step=1, growth=0, cap=1, draw_step=2))
    other = Codec(step=1.0, growth=-0.0, cap=1.0, draw_step=np.float64(2), level=np.int64(8))
    assert one.hash == CacheSpec(8, 2, temperatures=(1.0, 2.0), codec=other).hash
    (tmp_path / "spec.json").write_bytes(one.to_json().replace(b'"step": 1.0', b'"step": 1'))
    assert open_cache(tmp_path).spec == one


@pytest.mark.parametrize(
    "fields",
    [
        {"notes": "x" * 70_000},
        {"inputs": tuple(f"column_{i}" for i in range(65))},
        {"temperatures": tuple(1.0 + i for i in range(65))},
        {"codec": Codec(growth=1e-9)},
    ],
)
def test_what_would_not_fit(fields: dict[str, Any]) -> None:
    with pytest.raises(CacheError):
        CacheSpec(8, 2, **fields)


def test_the_most_columns_fit_into_the_end_of_a_shard(tmp_path: Path) -> None:
    names = ("tokens", *(f"c{i:02d}" + "x" * 61 for i in range(63)))
    write_one(tmp_path, spec_of("default", inputs=names, draws=2))
    assert open_cache(tmp_path).manifest.num_rows == 1
    same(tmp_path)


def test_numbers_too_high(tmp_path: Path) -> None:
    for fields in ({"index": 10**18}, {"first_sequence": 10**18}):
        with pytest.raises(CacheError, match=r"from 0 to 999,"):
            write_one(tmp_path, spec_of("default"), **fields)
    write_one(tmp_path, spec_of("default"), index=10**18 - 1)
    assert open_cache(tmp_path).shards == [10**18 - 1]
    with pytest.raises(CacheError, match="tail"):  # its code would not fit
        write_one(tmp_path, spec_of(Codec(tail_step=1e-4)), tail=np.full((80, 3), 2e5, np.float32))


def test_sizes_that_no_shard_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_one(tmp_path, spec_of("default"))
    for module, name in ((shardfile, "LARGEST"), (target_shards, "LARGEST")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, 1000)
            with pytest.raises(CorruptShard, match=r"more than|positions: got 80; expected"):
                open_cache(tmp_path).read_shard(0)
    for module in (shardfile, checks):
        with monkeypatch.context() as patch:
            patch.setattr(module, "LARGEST", 1000)
            with pytest.raises(CacheError, match="shard"):
                write_one(tmp_path, spec_of("default"), index=1)
    assert open_cache(tmp_path).shards == [0]


def test_a_head_of_everything_has_no_tail(tmp_path: Path) -> None:
    spec = CacheSpec(2, 2, temperatures=(1.0,))
    entry = {"inputs": {"tokens": [0]}, "ids": np.array([[1, 0]]), "logprobs": np.log(np.array([[0.5, 0.5]]))}
    with create_cache(tmp_path, spec) as writer:
        with pytest.raises(CacheError, match="outcomes"):
            writer.write_shard(0, **entry, tail=np.array([[-3.0]]))
        writer.write_shard(0, **entry, tail=np.array([[-np.inf]]))
    same(tmp_path)


def test_a_sealed_cache_has_the_shards_of_its_manifest(tmp_path: Path) -> None:
    for name in ("cache", "other"):
        write_one(tmp_path / name, spec_of("default"), index=4)
        write_one(tmp_path / name, spec_of("default"), index=0 if name == "cache" else 7, first_sequence=9)
    with create_cache(tmp_path / "cache", spec_of("default")) as writer:
        writer.seal()
        with pytest.raises(CacheError, match="is sealed"):
            writer.write_shard(7, {"tokens": [1]}, np.zeros((1, 0), int), np.zeros((1, 0)), np.zeros((1, 3)))
    late = tmp_path / "cache/shards/7.zarr.zip"
    late.write_bytes((tmp_path / "other/shards/7.zarr.zip").read_bytes())
    cache = open_cache(tmp_path / "cache")
    assert cache.shards == [0, 4]
    with pytest.raises(CacheError, match="sealed without it"):
        cache.read_shard(7)
    with pytest.raises(CacheError, match="none of this number"):
        cache.read_shard(2)
    assert not cache.verify()


def test_columns_of_lengths_are_columns(tmp_path: Path) -> None:
    write_one(tmp_path, spec_of("default", inputs=("tokens", "prompt_lengths")))
    cache = open_cache(tmp_path)
    np.testing.assert_array_equal(cache.sequences([0])["prompt_lengths"], cache.read_shard(0)["prompt_lengths"])


def test_a_large_vocabulary(tmp_path: Path) -> None:
    """Above 65,536 ids, with lists of frequent ones, draws that fill their rows, and no head."""
    rng = np.random.default_rng(6)
    n, draws = 40, 3
    ids = np.stack([rng.choice(90_000, draws, replace=False) if i % 2 else np.arange(3) for i in range(n)])
    logprobs = -np.sort(rng.exponential(2, (n, draws)), axis=1)
    spec = CacheSpec(100_000, 0, draws, codec="smallest", temperatures=(1.0,))
    with create_cache(tmp_path, spec) as writer:
        writer.write_shard(0, {"tokens": np.arange(n) % 2}, ids, logprobs, np.zeros((n, 1)), np.ones((n, draws), int))
    assert open_cache(tmp_path).zarr_group(0)["draws/context_tokens"].size
    assert (open_cache(tmp_path).read_shard(0)["draws"] == 1).all()
    same(tmp_path)


@pytest.mark.parametrize(
    ("title", "least"), [("## What a reader must check", 16), ("### What a reader of a feature", 5)]
)
def test_every_check_of_a_reader_has_its_test(title: str, least: int) -> None:
    section = re.split(r"\n###? ", FORMAT.read_text().split(f"\n{title}")[1])[0]
    source = "\n".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    points = re.findall(r"^- .*?(?=\n- |\n\n|\Z)", section, re.DOTALL | re.MULTILINE)
    assert len(points) >= least
    for point in points:
        assert re.search(r"`test_\w+`", point), point
    for name in re.findall(r"`(test_\w+)`", section):
        assert f"def {name}(" in source, name
