"""The tests of kernels on a GPU need torch, triton, numpy and pytest alone; and one of them cannot spoil the next."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from bare_machine import run_bare
from cases import nothing_waits

ROOT = Path(__file__).parent.parent.parent


def test_gpu_tests_of_kernels_are_collected_on_a_bare_machine(tmp_path: Path) -> None:
    options = ["-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    done = run_bare(["-m", "pytest", *options, str(ROOT / "tests" / "kernels")], tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = re.search(r"(\d+)/\d+ tests collected", done.stdout)
    assert found, done.stdout[-1000:]
    assert int(found[1]) > 300
    assert "error" not in done.stdout.splitlines()[-1]
    assert "could not import 'hypothesis'" in done.stdout  # it is a bare one


def test_torch_s_alarm_is_always_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Setting it warns after it is set."""
    modes = []

    def set_mode(mode: str) -> None:
        modes.append(mode)
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=2)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with nothing_waits():
        assert modes == ["error"]
    with pytest.raises(RuntimeError, match="waited"), nothing_waits():
        raise RuntimeError("waited")
    assert modes == ["error", "default"] * 2
