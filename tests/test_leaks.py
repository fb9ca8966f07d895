"""A soak: what is repeated for hours takes no more memory, descriptors or threads than after its first rounds."""

import ctypes
import gc
import json
import os
import shutil
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from forked import Forked
from train_cases import SMALL, Tiny, documents, make_cache

import fastkd

CHANGES: dict[str, Any] = SMALL | {"steps": 4, "checkpoint_every": 2, "evaluate_every": 4, "threads": 2}
MIB = 2**20


def passes(folder: Path) -> None:
    """A pass over a loader, one that is left in its middle and closed, and one that nobody closes."""
    loader = fastkd.DistillLoader(folder / "cache", batch_tokens=60, threads=2)
    assert sum(1 for _ in loader) > 3
    loader.close()
    for closed in (True, False):
        loader = fastkd.DistillLoader(folder / "cache", batch_tokens=60, threads=2)
        assert len(list(islice(loader, 2))) == 2
        if closed:
            loader.close()


def training(folder: Path) -> None:
    """A training with checkpoints, evaluations and an export."""
    assert fastkd.train("train_cases:dropping", folder / "cache", folder / "run", **CHANGES).complete
    shutil.rmtree(folder / "run")


def capturing(folder: Path) -> None:
    """A capture, sealed, and verified byte by byte."""
    fastkd.capture(Tiny(seed=7), documents(12), folder / "captured", k=4, draws=2, context=16, shard_positions=48)
    assert fastkd.cache.verify_cache(folder / "captured", deep=True).ok
    shutil.rmtree(folder / "captured")


def status_of(name: str) -> int:
    """A number of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def repeat(job: Callable[[Path], None], folder: Path, warm: int, times: int) -> None:
    """Print what is in use after some rounds, and after more."""
    found = []
    for rounds in (warm, times):
        for _ in range(rounds):
            job(folder)
        gc.collect()
        # threads of what nobody closed end by themselves, a moment later
        least, deadline = (found[0][1], time.monotonic() + 10) if found else (1, time.monotonic() + 1)
        while status_of("Threads") > least and time.monotonic() < deadline:
            time.sleep(0.01)
        ctypes.CDLL(None).malloc_trim(0)  # what is free but was not given back is no leak
        found.append([len(os.listdir("/proc/self/fd")), status_of("Threads"), status_of("VmRSS") * 1024])
    print(json.dumps(found))


def check(job: Callable[[Path], None], folder: Path, warm: int, times: int, most: float) -> None:
    """most: MiB that the later rounds may add."""
    make_cache(folder / "cache")
    process = Forked(repeat, job, folder, warm, times)
    out, err = process.communicate(timeout=3000)
    assert process.returncode == 0, err
    before, after = json.loads(out.splitlines()[-1])
    assert after[:2] == before[:2], f"descriptors and threads: {before[:2]} after {warm} rounds, then {after[:2]}"
    added = (after[2] - before[2]) / MIB
    assert added < most, f"{added:.1f} MiB in {times} rounds"


@pytest.mark.parametrize(("job", "warm", "times"), [(passes, 8, 16), (training, 3, 6), (capturing, 5, 20)])
def test_rounds_add_nothing(tmp_path: Path, job: Callable[[Path], None], warm: int, times: int) -> None:
    check(job, tmp_path, warm, times, most=6)


@pytest.mark.soak
@pytest.mark.parametrize(("job", "warm", "times"), [(passes, 50, 2000), (training, 20, 200), (capturing, 50, 1000)])
def test_many_rounds_add_nothing(tmp_path: Path, job: Callable[[Path], None], warm: int, times: int) -> None:
    """A leak of 8 kB in each round would show."""
    check(job, tmp_path, warm, times, most=max(6, times * 8 / 1024))


def test_a_leak_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="descriptors and threads"):
        check(leaking, tmp_path, 1, 2, most=6)


def leaking(folder: Path) -> None:
    os.open(folder, os.O_RDONLY)
