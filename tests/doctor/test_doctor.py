"""`fastkd doctor`: what it finds, and what it does when something is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkd.cache.stores.memory import MemoryStore
from fastkd.cli.main import main
from fastkd.doctor import device, place
from fastkd.doctor.machine import check_disk, check_load
from fastkd.doctor.packages import check_packages


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", str(tmp_path / "new")]) == 0
    said = capsys.readouterr().out
    for text in (
        "loss on cpu",
        "equals the float64 reference",
        f"torch {torch.__version__.partition('+')[0]}",
        "zarr 3.",
    ):
        assert text in said
    assert said.rstrip().endswith("No problem was found.")
    assert max(map(len, said.splitlines())) <= 80 or str(tmp_path) in said
    assert not (tmp_path / "new").exists()
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {one["state"] for one in found["found"]} <= {"ok", "note"}


def test_a_loss_that_is_wrong_is_a_problem(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = device.linear_kd_loss

    def wrong(*arguments: Any, impl: str, **more: Any) -> Any:
        found = real(*arguments, impl=impl, **more)
        return found._replace(loss=found.loss * 1.001) if impl == "auto" else found

    monkeypatch.setattr(device, "linear_kd_loss", wrong)
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "PROBLEM: it differs from the reference by 1.0e-03" in said
    assert said.rstrip().endswith("Problems: 1.")

    def broken(*arguments: Any, **more: Any) -> Any:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(device, "linear_kd_loss", broken)
    assert "RuntimeError: no kernel image" in device.check_loss(torch.device("cpu")).text


def test_requirements() -> None:
    given = [
        "torch>=2", "zarr>=99,<100", "a-package-of-nobody", "not-here>=1; platform_system == 'Nowhere'",
        "torch>=1; extra == 'cpu'", "absent>=1; extra == 'hf'", "numpy>=99; extra == 'hf'", "absent; extra == 'dev'",
        "fastkd[cpu,hf]; extra == 'all'", "fastkd[cpu]; extra == 'some'",
    ]  # fmt: skip
    found = list(check_packages(given))
    problems = [one.text for one in found if one.state == "problem"]
    assert len(problems) == 2
    assert problems[0].startswith("zarr 3.")
    assert "not <100,>=99. Install it" in problems[0]
    assert problems[1].startswith("a-package-of-nobody is not installed.")
    extras = {one.name: one.text for one in found if one.name.startswith("extras")}
    assert extras["extras"] == "cpu, some"
    assert extras["extras not there"].startswith("hf (absent is not installed; numpy ")
    assert "), all (absent is not installed; numpy " in extras["extras not there"]
    assert extras["extras not there"].endswith("To add one: pip install 'fastkd[hf]'")


def test_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_load(0.1, 2, 2).state == "ok"
    assert "PyTorch uses 1 thread;" in check_load(0.1, 2, 1).text
    assert check_load(1.9, 2, 2).state == "note"
    assert check_load(None, 2, 2).state == "ok"
    assert check_disk(tmp_path / "a" / "b").text.endswith(f"free at {tmp_path}")
    (tmp_path / "file").write_text("")
    assert check_disk(tmp_path / "file" / "cache").text == f"{tmp_path / 'file'}: a file; expected a folder."
    monkeypatch.setattr("os.access", lambda path, how: False)
    assert check_disk(tmp_path).state == "problem"


class Careless(MemoryStore):
    """It creates again what is there."""

    _exclusive = False

    def _put(self, key: str, data: memoryview) -> bool:
        return True


def test_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place.check_place("memory://doctor").text.endswith("lists, creates, and refuses to create twice")
    assert place.check_place("https://127.0.0.1:1/cache").state in ("note", "problem")
    assert "unknown scheme" in place.check_place("nowhere://x").text
    monkeypatch.setattr(place, "open_store", lambda name: Careless())
    found = place.check_place("memory://careless")
    assert (found.state, "ignores `If-None-Match: *`" in found.text) == ("problem", True)
