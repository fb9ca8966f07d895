"""What a cache returns, as SparseTargets."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cases import GRID, same

from fastkd import SparseTargets, targets_from_arrays
from fastkd.cache import CacheSpec, create_cache, open_cache
from fastkd.kernels.targets import FIELDS


def test_a_cache_has_the_fields_under_the_same_names_and_types(tmp_path: Path) -> None:
    """The cache may not import the kernels: what it returns is held against their table here."""
    n, k, draws = 6, 3, 2
    logits = torch.randn(n, 20, generator=torch.Generator().manual_seed(0)) * 3
    targets = SparseTargets.from_logits(logits, k, temperatures=GRID, draws=draws)
    with create_cache(tmp_path, CacheSpec(20, k, draws, temperatures=GRID)) as writer:
        writer.write_shard(0, {"tokens": np.arange(n)}, **targets.arrays())
    cache = open_cache(tmp_path)
    read = cache.read_shard(0)
    of_a_row = {name for name, array in read.items() if array.ndim and len(array) == n} - {"tokens"}
    assert of_a_row - {"sequence_lengths"} == {field.name for field in FIELDS}
    for field in FIELDS:
        assert torch.from_numpy(read[field.name]).dtype == field.dtype
        assert read[field.name].shape == tuple(getattr(targets, field.name).shape)
    stored = SparseTargets.from_arrays(read, vocab_size=20, temperatures=GRID)
    assert torch.equal(stored.ids, targets.ids)
    assert torch.equal(stored.draws, targets.draws)
    assert torch.allclose(stored.tail, targets.tail, atol=0.05)
    with pytest.warns(DeprecationWarning, match=r"SparseTargets\.from_arrays"):
        assert same(targets_from_arrays(read, cache.spec), stored)
    read["logprobs"][2], read["ids"][2], read["draws"][2] = -np.inf, 0, 0
    with pytest.warns(DeprecationWarning, match="from_arrays"):
        compact = targets_from_arrays(read, cache.spec, compact=True)
    assert compact.index.tolist() == [0, 1, 3, 4, 5]
    assert torch.equal(compact.ids, targets.ids[compact.index])
