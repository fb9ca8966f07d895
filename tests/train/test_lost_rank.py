"""A process of several that is killed or stopped: the others end soon, with one sentence, and all resume."""

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import train_jobs
from train_cases import SMALL, make_cache

from fastkd.errors import TrainError
from fastkd.train.checkpoint import steps_of
from fastkd.utils.distributed import joined_processes

CHANGES: dict[str, Any] = SMALL | {"steps": 12, "checkpoint_every": 2}


@pytest.mark.parametrize(
    ("number", "of", "parallel", "message"),
    [
        (signal.SIGKILL, 1, "ddp", "another process of the job has ended"),
        (signal.SIGSTOP, 0, "ddp", "has not answered for 0.1 minutes"),
        pytest.param(signal.SIGKILL, 0, "fsdp", "another process of the job has ended", marks=pytest.mark.soak),
        pytest.param(signal.SIGSTOP, 1, "fsdp", "has not answered for 0.1 minutes", marks=pytest.mark.soak),
    ],
)
def test_the_others_end(number: int, of: int, parallel: str, message: str, tmp_path: Path) -> None:
    make_cache(tmp_path / "cache")
    changes = CHANGES | {"timeout_minutes": 0.1, "parallel": parallel}
    said, arguments = tmp_path / "said", ("train_cases:tiny", tmp_path / "cache", tmp_path / "run", changes)
    running = train_jobs.start(train_jobs.train_and_lose, *arguments, 5, of, number, said, ranks=2)
    other, begun = running[1 - of], time.monotonic()
    try:
        other.join(120)
        assert other.exitcode == 75, f"after {time.monotonic() - begun:.0f} s"
    finally:
        for process in running:
            process.kill()
            process.join()
    assert message in said.read_text()
    assert said.read_text().count("\n") == 0
    assert max(steps_of(tmp_path / "run")) == 4
    changes["timeout_minutes"] = 5.0
    train_jobs.run(train_jobs.train, *arguments, ranks=2)
    assert os.path.exists(tmp_path / "run" / "run.json")


def test_processes_that_cannot_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The port is taken, by something that is none of them."""
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(TrainError, match=r"cannot meet: .*address already in use"), joined_processes("cpu"):
            pass
