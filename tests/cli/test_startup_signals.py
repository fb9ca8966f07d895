"""A signal while a command starts: it ends with 75, whatever is being imported or loaded, and says nothing but that."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from train_cases import make_cache

TESTS = Path(__file__).parents[1]
GENTLE = "stopping after the current batch"  # a command that has begun its job says so


def data() -> list[list[int]]:
    """A factory for --data."""
    from train_cases import documents

    return documents(400)


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[Path], list[str]]]:
    cache = tmp_path_factory.mktemp("signals") / "cache"
    make_cache(cache)
    train = ["--student", "train_cases:tiny", "--cache", str(cache), "--steps", "100000", "--out"]
    capture = ["--teacher", "train_cases:tiny", "--data", "test_startup_signals:data", "--out"]
    return {
        "capture": lambda out: ["capture", *capture, str(out), "--context", "64", "--shard-positions", "64"],
        "train": lambda out: ["train", *train, str(out)],
        "sweep": lambda out: ["sweep", *train, str(out), "--alpha", "0", "1"],
    }


def handles_sigterm(pid: int) -> bool:
    """Whether the process has a handler: before, Python itself starts, and the system ends it."""
    text = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in text.splitlines() if line.startswith("SigCgt")).split()[1]
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def signalled(command: list[str], seconds: float, number: int) -> tuple[int, str]:
    """The exit status and stderr of a command that gets a signal after this time."""
    environment = os.environ | {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS / 'cli'}", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "fastkd", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment,
    ) as process:  # fmt: skip
        while process.poll() is None and not handles_sigterm(process.pid):
            time.sleep(0.001)
        time.sleep(seconds)
        process.send_signal(number)
        err = process.communicate(timeout=120)[1]
    return process.returncode, err


EVERY_10_MS = [n / 100 for n in range(1000)]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("name", "moments"),
    [
        # each starts Python and imports torch: all moments over the commands, and the last by SIGINT
        ("capture", [0.0, 0.6]),
        ("train", [0.15, 1.7]),
        ("sweep", [0.6, 0.15]),
        *(pytest.param(name, EVERY_10_MS, marks=pytest.mark.soak) for name in ("capture", "train", "sweep")),
    ],
)
def test_a_signal_at_any_moment(
    name: str, moments: list[float], commands: dict[str, Callable[[Path], list[str]]], tmp_path: Path
) -> None:
    begun = 0
    for i, moment in enumerate(moments):
        number = signal.SIGINT if i % 2 else signal.SIGTERM
        status, err = signalled(commands[name](tmp_path / str(i)), moment, number)
        assert status in (0, 75), f"{moment} s: {status}, {err}"
        assert "Traceback" not in err, f"{moment} s: {err}"
        assert "Exception ignored" not in err, f"{moment} s: {err}"
        begun += GENTLE in err
        if begun > 20:
            break
