"""Small random targets for the tests of the cache, in all shapes that targets can have."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastkd.cache import CacheSpec
from fastkd.cache.shard import container as shardfile

Arrays = dict[str, Any]


def make_spec(**changes: Any) -> CacheSpec:
    """A small cache: 500 tokens, 8 top-k entries."""
    return CacheSpec(**({"vocab_size": 500, "k": 8, "teacher": "made up", "shard_positions": 4096} | changes))


def make_shard(
    spec: CacheSpec, positions: int = 96, seed: int = 0, sequences: int = 4, uncounted: float = 0.1
) -> Arrays:
    """Keyword arguments of `write_shard`, from random dense teachers."""
    rng = np.random.default_rng(seed)
    vocab, n = spec.vocab_size, positions
    logits = rng.gumbel(size=(n, vocab)) * rng.uniform(0.5, 3, (n, 1)) - 2 * np.log1p(np.arange(vocab))
    logprobs = logits - np.logaddexp.reduce(logits, 1)[:, None]
    order = np.argsort(-logprobs, axis=1, kind="stable")
    ranked = np.take_along_axis(logprobs, order, 1)
    k = min(spec.k, vocab)
    head = np.zeros((n, vocab), bool)
    head[:, :k] = True
    if spec.mass is not None:
        before = np.concatenate([np.zeros((n, 1)), np.exp(ranked).cumsum(1)[:, :-1]], 1)
        head &= before < spec.mass
    counted = rng.random(n) >= uncounted
    width = spec.width
    ids, kept = np.zeros((n, width), np.int64), np.full((n, width), -np.inf, np.float32)
    draws = np.zeros((n, width), np.int32)
    for i in np.flatnonzero(counted):
        count = int(head[i].sum())
        ids[i, :count], kept[i, :count] = order[i, :count], ranked[i, :count]
        tail = order[i, count:]
        if spec.draws and len(tail):
            weights = np.exp(logprobs[i, tail] / spec.draw_temperature)
            drawn, times = np.unique(rng.choice(tail, spec.draws, p=weights / weights.sum()), return_counts=True)
            best = np.argsort(-logprobs[i, drawn], kind="stable")
            where = slice(count, count + len(drawn))
            ids[i, where], kept[i, where], draws[i, where] = drawn[best], logprobs[i, drawn[best]], times[best]
    outside = np.where(head, -np.inf, ranked)
    with np.errstate(divide="ignore"):
        tail = np.stack([np.logaddexp.reduce(outside / t, 1) for t in spec.temperatures], 1).astype(np.float32)
    cuts = np.sort(rng.choice(np.arange(1, n), sequences - 1, replace=False)) if sequences > 1 else np.zeros(0, int)
    shard: Arrays = {
        "inputs": {name: rng.integers(0, vocab, n) for name in spec.inputs},
        "ids": ids,
        "logprobs": kept,
        "tail": tail,
        "sequence_lengths": np.diff(np.concatenate([[0], cuts, [n]])),
    }
    return shard | ({"draws": draws} if spec.draws else {})


def unpacked(data: bytes) -> tuple[dict[str, Any], Arrays]:
    """Attributes and all arrays of an object whose bytes are checked."""
    shardfile.check_bytes(data)
    files = shardfile.members(data)
    names = [
        n.removesuffix("/zarr.json") for n, text in files.items() if b'"node_type":"array"' in text.replace(b" ", b"")
    ]
    return shardfile.read_attributes(data), shardfile.unpack(data, dict.fromkeys(names))


def as_sets(ids: NDArray[Any], logprobs: NDArray[Any]) -> list[dict[int, float]]:
    """Each row's entries, by id."""
    return [
        {int(i): float(x) for i, x in zip(row, values, strict=True) if x > -np.inf}
        for row, values in zip(ids, logprobs, strict=True)
    ]
