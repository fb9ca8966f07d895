"""The formats that the cache is measured against give back what they were given."""

from pathlib import Path

import numpy as np
import pytest

from fastkd.bench.bench_cache import kl
from fastkd.bench.bench_formats import OTHERS, samples, with_rest
from fastkd.bench.formats import BITS, DRAWS, EXACT, Sampled

N, K = 300, 64


def targets() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    ids = np.stack([random.permutation(2**BITS)[:K] for _ in range(N)]).astype(np.int32)
    ids[0, :2] = 0, 2**BITS - 1
    logits = np.sort(random.normal(size=(N, K)) * 3, axis=1)[:, ::-1]
    return ids, (logits - np.log(np.exp(logits).sum(1, keepdims=True)) - 0.1).astype(np.float32)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_written_is_read(name: str, tmp_path: Path) -> None:
    ids, logprobs = targets()
    OTHERS[name].write(tmp_path / "it", ids, logprobs)
    read_ids, read = OTHERS[name].read(tmp_path / "it")
    assert read.dtype == np.float32
    assert np.array_equal(read_ids, ids)
    exact = EXACT if "polynomial" in name else K
    assert np.allclose(read[:, :exact], logprobs[:, :exact], atol=0, rtol=1e-3)
    assert np.abs(read - logprobs).mean() < 0.5
    error = kl(with_rest(ids, logprobs), with_rest(read_ids, read), 1.0)
    assert 0 < error.mean() < 0.02


def test_sampled_entries_are_read(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    counts = np.sort(random.multinomial(DRAWS, np.full(20, 0.05), size=N), axis=1)[:, ::-1]
    ids = random.integers(0, 2**BITS, counts.shape)
    Sampled().write(tmp_path / "it", ids, counts)
    assert (tmp_path / "it").stat().st_size == 8 + N + 3 * (counts > 0).sum()
    read_ids, read = Sampled().read(tmp_path / "it")
    used = counts[:, : read.shape[1]] > 0
    assert np.array_equal(read_ids[used], ids[:, : read.shape[1]][used])
    assert np.allclose(np.exp(read) * DRAWS, counts[:, : read.shape[1]])


def test_samples_are_of_the_whole_distribution() -> None:
    """Head of two, and three tokens that were drawn from the rest: shares come out, the tail's by its draws."""
    rows = 4000
    hybrid = {
        "ids": np.tile(np.array([[7, 5, 9, 3, 1]], np.int32), (rows, 1)),
        "logprobs": np.tile(np.log([[0.5, 0.2, 0.01, 0.01, 0.01]]), (rows, 1)),
        "draws": np.tile(np.array([[0, 0, 2, 1, 1]], np.int32), (rows, 1)),
    }
    ids, counts = samples(hybrid)
    assert (counts.sum(1) == DRAWS).all()
    shares = {token: counts[ids == token].sum() / rows / DRAWS for token in (7, 5, 9, 3, 1)}
    expected = {7: 0.5, 5: 0.2, 9: 0.15, 3: 0.075, 1: 0.075}
    error = np.sqrt(0.25 / rows / DRAWS)
    assert all(abs(shares[token] - expected[token]) < 5 * error for token in expected)
