"""Top-k of a head divided over 2 and 4 ranks equals one rank's; each launch runs all of topk_jobs.py."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import topk_jobs
import torch
from forked import Forked

from fastkd import KDError, linear_topk_targets


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.soak)])
def raised(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each rank's jobs raised, by their names."""
    ranks, folder = request.param, tmp_path_factory.mktemp("ranks")
    running = [Forked(topk_jobs.run, rank, ranks, str(folder)) for rank in range(ranks)]
    outputs = [(rank.communicate(timeout=300), rank.returncode) for rank in running]
    assert [status for _, status in outputs] == [0] * ranks, outputs
    return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize("name", [name for name, _ in topk_jobs.jobs()])
def test_divided(name: str, raised: list[dict[str, str]]) -> None:
    if name.endswith("numba") and find_spec("numba") is None:
        pytest.skip("without Numba")
    for rank, by_name in enumerate(raised):
        assert by_name.get(name, "did not run: ranks waited for each other before") == "", f"rank {rank}"


def test_a_first_column_needs_a_group() -> None:
    with pytest.raises(KDError, match="vocab_start: got 0 without a group"):
        linear_topk_targets(torch.zeros(1, 2), torch.zeros(3, 2), 1, vocab_start=0)
