"""Small made-up hidden states and feature maps for the tests of features."""

from typing import Any

import numpy as np
from cache_cases import make_shard, make_spec

from fastkd.cache import Basis, CacheSpec, FeatureSpec, create_cache, create_feature, encode_hidden

POSITIONS, WIDTH, STEP = 60, 12, 0.06
Arrays = dict[str, Any]


def make_states(seed: int, count: int = POSITIONS, width: int = WIDTH, dtype: str = "bfloat16") -> np.ndarray:
    """States of a falling spectrum around a mean, float32 `[count, width]`, in numbers of a dtype; the first a sink."""
    mixing = np.random.default_rng(7).standard_normal((width, width)) * np.exp(-np.arange(width) / 4)
    random = np.random.default_rng(seed)
    states = (random.standard_normal((count, width)) @ mixing * 9 + 1).astype(np.float32)
    states[0] *= 1000 if dtype != "float16" else 300
    if dtype == "bfloat16":
        states = (states.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return states.astype(dtype).astype(np.float32) if dtype != "bfloat16" else states


def make_base(place: Any, shards: int = 3, seal: bool = False, **changes: Any) -> CacheSpec:
    """A cache of `shards` shards of POSITIONS positions."""
    spec = make_spec(**({"vocab_size": 40, "k": 3} | changes))
    with create_cache(place, spec) as writer:
        for i in range(shards):
            writer.write_shard(i, **make_shard(spec, POSITIONS, seed=i), first_sequence=4 * i)
        if seal:
            writer.seal()
    return spec


def make_basis(width: int = WIDTH) -> Basis:
    return Basis.learn(make_states(99, 800, width))


def make_feature_spec(cache: CacheSpec, basis: Basis, **changes: Any) -> FeatureSpec:
    """A state of layer 20 of 30 by default."""
    given: Arrays = {"base": cache.hash, "name": "20", "kind": "state", "layer": 20, "layers": 30}
    given |= {"shape": (basis.width,), "step": STEP, "positions": "all", "seed": 0, "dtype": "bfloat16"}
    return FeatureSpec(**(given | {"basis": basis.sha256} | changes))


def write_feature(
    place: Any, base: CacheSpec, shards: int = 3, seal: bool = False, kl: float | None = None, **changes: Any
) -> FeatureSpec:
    """A feature of the cache of `make_base`, from `make_states(index)`."""
    basis, record = make_basis(), None if kl is None else {"kl": kl}
    spec = make_feature_spec(base, basis, **changes)
    with create_feature(place, spec, basis) as writer:
        for i in range(shards):
            writer.write_shard(i, encode_hidden(make_states(i, dtype=spec.dtype), basis, spec.step), record=record)
        if seal:
            writer.seal()
    return spec
