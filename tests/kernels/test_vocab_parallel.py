"""The loss of a head divided over 2 and 4 ranks equals one rank's: the jobs of vocab_jobs.py, each rank a process."""

import json
from pathlib import Path

import pytest
import vocab_jobs
from forked import Forked

RANKS = pytest.mark.parametrize("ranks", vocab_jobs.SPLITS)


def run(ranks: int, folder: Path, *, everything: bool) -> None:
    """All jobs in one launch; each that raised on some rank is named."""
    running = [Forked(vocab_jobs.run, rank, ranks, str(folder), everything) for rank in range(ranks)]
    outputs = [(rank.communicate(timeout=500), rank.returncode) for rank in running]
    assert [status for _, status in outputs] == [0] * ranks, outputs
    names = [name for name, _ in vocab_jobs.jobs(ranks, everything)]
    for rank in range(ranks):
        raised = json.loads(Path(folder, f"{rank}.json").read_text())
        assert {name: text for name, text in raised.items() if text} == {}, f"rank {rank}"
        assert list(raised) == names


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_divided(ranks: int, tmp_path: Path) -> None:
    run(ranks, tmp_path, everything=False)


@pytest.mark.soak
@RANKS
def test_everything_divided(ranks: int, tmp_path: Path) -> None:
    """All kinds of cases with interpreted kernels too."""
    run(ranks, tmp_path, everything=True)
