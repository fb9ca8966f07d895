"""The examples run, and what they write is what they say."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from fastkd.cache import Basis

EXAMPLES = Path(__file__).parents[2] / "examples"


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
