"""The loss of a head divided over 2 and 4 ranks equals one rank's; each launch runs all of vocab_jobs.py."""

import json
from pathlib import Path

import pytest
import vocab_jobs
from forked import Forked


@pytest.fixture(scope="module", params=sorted(vocab_jobs.SPLITS))
def raised(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each rank's jobs raised, by their names."""
    ranks, folder = request.param, tmp_path_factory.mktemp("ranks")
    running = [Forked(vocab_jobs.run, rank, ranks, str(folder)) for rank in range(ranks)]
    outputs = [(rank.communicate(timeout=300), rank.returncode) for rank in running]
    assert [status for _, status in outputs] == [0] * ranks, outputs
    return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize("name", [name for name, _ in vocab_jobs.jobs()])
def test_divided(name: str, raised: list[dict[str, str]]) -> None:
    for rank, by_name in enumerate(raised):
        assert by_name.get(name, "did not run: ranks waited for each other before") == "", f"rank {rank}"
