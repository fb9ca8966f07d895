"""Shards that somebody made up, under right hashes: refused by name, or read as the plain reader reads them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from forgery import SPECS

FOLDER = Path(__file__).parents[1]


def run(name: str, sample: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(FOLDER / "forgery.py"), name, sample], capture_output=True, text=True
    )
    assert done.returncode == 0, f"died of {done.stderr.splitlines()[-1:]}"
    report = json.loads(done.stdout)
    assert not report["failures"], "\n".join(report["failures"][:20])
    assert report["grown"] < 2**29, "memory"
    counts: dict[str, int] = report["counts"]
    assert counts["refused"] > counts["read"] > 0
    return counts


@pytest.mark.parametrize("name", SPECS)
def test_a_sample_of_typed_forgeries(name: str) -> None:
    assert sum(run(name, "400").values()) >= 400


@pytest.mark.soak
@pytest.mark.parametrize("name", SPECS)
def test_every_typed_forgery(name: str) -> None:
    assert sum(run(name, "all").values()) > 2000
