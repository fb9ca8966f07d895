"""Small operations on a CPU, timed by pytest-benchmark, to compare two commits.

    make bench-micro SAVE=before      # then change something
    make bench-micro                  # compared with the last one saved

Nothing fails because it is slow. Sizes are small; whole stages are measured by `fastkd bench`.
"""

from collections.abc import Iterator
from itertools import count, cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastkd import SparseTargets, kd_loss, linear_kd_loss
from fastkd.bench.cases import GRID, known_targets, student_logits
from fastkd.cache import Cache, CacheSpec, Workspace, create_cache, open_cache
from fastkd.kernels import topk_targets
from fastkd.stream.epoch_order import order

Benchmark = Any
N, V, D, K = 128, 8192, 128, 48


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread in torch, so that other cores do not matter."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Four shards of 1,024 positions."""
    place, n = tmp_path_factory.mktemp("micro") / "cache", 1024
    spec = CacheSpec(vocab_size=V, k=K, temperatures=GRID, inputs=("tokens",))
    tokens = np.random.default_rng(0).integers(0, V, n, np.int32)
    with create_cache(place, spec) as writer:
        for index in range(4):
            writer.write_shard(index, **_arrays(n, index), inputs={"tokens": tokens}, **_sequences(n, index))
        writer.seal()
    return open_cache(place)


def _arrays(n: int, seed: int = 0) -> dict[str, Any]:
    targets = known_targets(n, V, K, 0, "cpu", seed=seed)
    return {"ids": targets.ids.numpy(), "logprobs": targets.logprobs.numpy(), "tail": targets.tail.numpy()}


def _sequences(n: int, index: int) -> dict[str, Any]:
    return {"sequence_lengths": [128] * (n // 128), "first_sequence": index * (n // 128)}


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tvd"])
def test_kd_loss(benchmark: Benchmark, divergence: str) -> None:
    targets, labels = known_targets(N, V, K, 0, "cpu"), torch.randint(V, (N,))
    logits = student_logits(N, V, targets, "cpu", torch.float32)

    def step() -> torch.Tensor:
        leaf = logits.detach().requires_grad_()
        kd_loss(leaf, targets, labels, divergence=divergence, temperature=2.0).loss.backward()
        assert leaf.grad is not None
        return leaf.grad

    assert benchmark(step).isfinite().all()


@pytest.mark.parametrize("draws", [0, 16])
def test_linear_kd_loss(benchmark: Benchmark, draws: int) -> None:
    targets, labels = known_targets(N, V, K, draws, "cpu"), torch.randint(V, (N,))
    hidden = torch.randn(N, D, requires_grad=True)
    weight = (torch.randn(V, D) / D**0.5).requires_grad_()

    def step() -> torch.Tensor:
        hidden.grad = weight.grad = None
        linear_kd_loss(hidden, weight, targets, labels).loss.backward()
        assert hidden.grad is not None
        return hidden.grad

    assert benchmark(step).isfinite().all()


@pytest.mark.parametrize("draws", [0, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_topk_targets(benchmark: Benchmark, dtype: torch.dtype, draws: int) -> None:
    logits = (torch.randn(N, V) * 3).to(dtype)
    found = benchmark(lambda: topk_targets(logits, K, temperatures=GRID, draws=draws))
    assert found.ids.shape == (N, K + draws)


@pytest.mark.parametrize("codec", ["default", "fast", "smallest", "portable"])
def test_write_shard(benchmark: Benchmark, tmp_path: Path, codec: Any) -> None:
    n, places = 1024, count()
    arrays, tokens = _arrays(n), np.zeros(n, np.int32)
    spec = CacheSpec(vocab_size=V, k=K, temperatures=GRID, inputs=("tokens",), codec=codec)

    def write() -> int:
        with create_cache(tmp_path / str(next(places)), spec) as writer:
            writer.write_shard(0, **arrays, inputs={"tokens": tokens}, **_sequences(n, 0))
        return n

    assert benchmark(write) == n


def test_read_shard(benchmark: Benchmark, cache: Cache) -> None:
    space = Workspace()
    assert len(benchmark(lambda: cache.read_shard(1, into=space))["ids"]) == 1024


def test_targets_from_arrays(benchmark: Benchmark, cache: Cache) -> None:
    arrays = cache.read_shard(0)
    assert len(benchmark(lambda: SparseTargets.from_arrays(arrays, vocab_size=V, temperatures=GRID))) == 1024


def test_order(benchmark: Benchmark) -> None:
    epoch = order(np.full(10**5, 2048), 0, 0)
    starts = cycle(range(10**7, 10**8, 512))

    def take() -> int:
        first = next(starts)
        return len(epoch.take(first, first + 512).shard)

    assert benchmark(take) == 512
