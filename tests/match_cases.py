"""Features for tiny caches, and what batches and losses of them should be, in obvious lines."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastkd.cache import Basis, Cache, FeatureSpec, create_feature, encode_hidden

Floats = NDArray[np.float32]


def state_of(tokens: NDArray[Any], width: int = 12) -> Floats:
    """A state for each row, which depends on its token and on its number in the shard; the first of a shard is a
    sink."""
    mixing = np.random.default_rng(5).standard_normal((width, width)) * np.exp(-np.arange(width) / 6)
    angles = np.add.outer(tokens * 1.7 + np.arange(len(tokens)) * 0.01, np.arange(width) * 2.3)
    states = (np.sin(angles * 12.9898) @ mixing * 4 + 0.5).astype(np.float32)
    states[:1] *= 1000
    return states


def add_feature(
    cache: Cache,
    name: str = "2",
    *,
    layers: int = 3,
    width: int = 12,
    positions: str = "all",
    step: float = 0.01,
    leave_out: tuple[int, ...] = (),
    values: Callable[[dict[str, Any]], Floats] | None = None,
    basis: Basis | None = None,
    shape: tuple[int, ...] | None = None,
    block: bytes | None = None,
    block_sha256: str | None = None,
    seal: bool = True,
) -> Basis:
    """Add a feature to a cache, of `state_of` its tokens or of `values` of a shard's arrays `[n, *shape]`; with
    positions="0.5", of every other position. Returns its basis."""
    state = shape is None
    shape = shape or (width,)
    vectors, width = (shape[1] * shape[2], shape[0]) if len(shape) == 3 else (1, int(np.prod(shape)))

    def rows_of(arrays: dict[str, Any]) -> Floats:
        found = state_of(arrays["tokens"], width) if values is None else values(arrays)
        return np.ascontiguousarray(np.moveaxis(found, 1, -1) if len(shape) == 3 else found).reshape(-1, width)

    shards = {index: cache.read_shard(index) for index in cache.shards}
    if basis is None:
        basis = Basis.learn(np.concatenate([rows_of(arrays) for arrays in shards.values()]))
    layer = (layers if name == "-1" else int(name)) if state else None
    spec = FeatureSpec(
        base=cache.spec.hash,
        name=name,
        kind="state" if state else "map" if len(shape) == 3 else "attention_map",
        layer=layer,
        layers=layers if state else None,
        shape=shape,
        step=step,
        positions=positions,
        seed=0,
        dtype="float32",
        basis=basis.sha256,
        block=block_sha256,
    )
    with create_feature(cache.store, spec, basis, block) as writer:
        for index, arrays in shards.items():
            if index in leave_out:
                continue
            found = rows_of(arrays)
            rows = None
            if positions != "all":
                rows = np.arange(0, len(found) // vectors, 2)
                rows = (rows[:, None] * vectors + np.arange(vectors)).ravel()
                found = found[rows]
            writer.write_shard(index, encode_hidden(found, basis, step), rows)
        if seal and not leave_out:
            writer.seal()
    return basis
