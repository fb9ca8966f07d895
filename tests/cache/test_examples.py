"""The examples run, and what they write is what they say."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from fastkd.cache import Basis, open_cache

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_import_server_logprobs(tmp_path: Path) -> None:
    example = runpy.run_path(str(EXAMPLES / "import_server_logprobs.py"))
    example["main"](str(tmp_path / "cache"))
    cache = open_cache(tmp_path / "cache")
    assert cache.sealed
    assert cache.verify().ok
    shard = cache.read_shard(0)
    assert shard["sequence_lengths"].tolist() == [5, 3]
    assert shard["tokens"].tolist() == [1, 529, 338, 278, 2, 1, 920, 2]
    # what the server said of each generated token stands where the token before it is
    counted = np.isfinite(shard["logprobs"]).any(1)
    assert np.flatnonzero(counted).tolist() == [2, 3, 6]
    assert shard["ids"][2].tolist() == [278, 263, 385, 599]
    assert shard["ids"][3].tolist() == [2, 29889, 13, 0]  # −9999 is no log-probability
    steps = cache.spec.settings
    np.testing.assert_allclose(shard["logprobs"][6], [-0.1054, -2.6, -4.2, -4.9], atol=steps.cap)
    mass = np.exp([-0.1054, -2.6, -4.2, -4.9]).sum()
    np.testing.assert_allclose(shard["tail"][6], np.log1p(-mass), atol=steps.tail_step)
    # a list that sums to 1 leaves what float32 cannot see, not nothing and not NaN
    np.testing.assert_allclose(shard["tail"][3], -24 * np.log(2), atol=steps.tail_step)


def test_draft_head(capfd: pytest.CaptureFixture[str]) -> None:
    """A draft learns from coded states what it learns from exact ones, as well as the step allows."""
    example = runpy.run_path(str(EXAMPLES / "draft_head.py"))
    found = example["main"](["--toy", "--step", "0.02", "--steps", "60"])
    (exact,), (coded,) = found["acceptance"]["exact"], found["acceptance"]["coded"]
    assert exact > 0.2, "an untrained draft has 0.02"
    assert coded == pytest.approx(exact, abs=0.02)
    assert found["bytes a position, all layers"] > 32
    assert "coded states, seed 0: acceptance" in capfd.readouterr().out


def test_the_unfolded_fusion_reads_the_states_themselves() -> None:
    example = runpy.run_path(str(EXAMPLES / "draft_head.py"))
    states = [10 * torch.randn(5, 6), torch.randn(5, 6), torch.randn(5, 6)]
    bases = [
        torch.from_numpy(Basis.learn(10 * np.random.default_rng(i).random((40, 6), np.float32)).basis) for i in range(3)
    ]

    class Draft:
        fuse = torch.nn.Linear(18, 6, bias=False)

    units = torch.cat([x / x.square().mean(1, keepdim=True).sqrt() for x in states], 1)
    z = example["coordinates"](states, bases)
    torch.testing.assert_close(units @ example["unfold"](Draft, bases).T, Draft.fuse(z), atol=1e-5, rtol=1e-4)
