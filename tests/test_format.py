"""cache/FORMAT.md is enough to read a cache: what a reader made from it finds is what fastkd finds."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import plain_reader
import pytest

from fastkd.cache import CODECS, CacheSpec, Codec, create_cache, open_cache

FORMAT = Path(__file__).parent.parent / "cache" / "FORMAT.md"
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
        assert "head/context_counts" in open_cache(tmp_path).raw_shard(0)
        assert len(open_cache(tmp_path).raw_shard(0)["head/context_tokens"]) > 2
    same(tmp_path)


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
