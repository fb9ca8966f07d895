"""The first three walks of docs/extending.md, run as they stand there: one file each, and nothing else changes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "extending.md"
DIVERGENCE = """
import torch
import fastkd

torch.manual_seed(0)
teacher, student = torch.randn(2, 7, 50, dtype=torch.float64)
targets = fastkd.SparseTargets.from_logits(teacher, 12)
results = {}
for impl in ("torch", "reference", "triton"):
    x = student.detach().clone().to(torch.float64 if impl == "reference" else torch.float32).requires_grad_()
    loss = fastkd.kd_loss(x, targets, None, divergence="hellinger", temperature=2.0, impl=impl).loss
    loss.backward()
    results[impl] = loss.detach().double(), x.grad.double()
for value, gradient in results.values():
    torch.testing.assert_close(value, results["reference"][0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradient, results["reference"][1], atol=1e-6, rtol=1e-5)
# forward and backward are right, not only alike: the definition, on the outcomes that the bucket leaves
at = targets.at(2.0, "bucket", dtype=torch.float64)
p = torch.softmax(student.double() / 2, 1).gather(1, targets.ids.long())
q = at.log_q.exp()
rest = (at.log_q_tail.exp().sqrt() - (1 - p.sum(1)).sqrt()) ** 2
mean = 4 * 0.5 * (((q.sqrt() - p.sqrt()) ** 2).sum(1) + rest).mean()
torch.testing.assert_close(results["torch"][0], mean, atol=1e-6, rtol=1e-6)

from fastkd.cli.parse import parse
command = parse("train --student s --cache c --out o --divergence hellinger".split())
print(sorted(results), command.divergence)
"""
FEATURE_LOSS = """
import torch
from fastkd.kernels import HiddenTargets, find_feature_loss

torch.manual_seed(0)
targets = HiddenTargets.from_states(torch.randn(30, 8) * 3, step=1e-3)
found = find_feature_loss("l1")
results = []
for form, dtype in ((found.loss, torch.float32), (found.oracle, torch.float64)):
    torch.manual_seed(1)
    student = torch.randn(30, 8).to(dtype).requires_grad_()
    value = form(student, targets, 40)
    value.backward()
    results.append((value.detach().double(), student.grad.double()))
torch.testing.assert_close(*results, atol=1e-3, rtol=0)

from fastkd.cli.parse import parse
command = parse("train --student s --cache c --out o --match 2:1:l1:0.1".split())
print(found.dense, *command.match)
"""
STORE = """
import sys
import numpy as np
import torch
from fastkd import SparseTargets
from fastkd.cache import CacheSpec, create_cache, open_cache, verify_cache

place = f"sqlite://{sys.argv[1]}"
targets = SparseTargets.from_logits(torch.randn(8, 100), k=4)
with create_cache(place, CacheSpec(vocab_size=100, k=4)) as writer:
    arrays = {name: getattr(targets, name).numpy() for name in ("ids", "logprobs", "tail")}
    writer.write_shard(0, inputs={"tokens": np.arange(8)}, sequence_lengths=[8], first_sequence=0, **arrays)
    writer.seal()
cache = open_cache(place)
assert (np.sort(cache.read_shard(0)["ids"]) == np.sort(targets.ids.numpy())).all()
print(verify_cache(cache.store, deep=True).ok, cache.store.describe() == place)
"""


WALKS = """
import contextlib, io, json, sys, traceback
found = {}
for name, code in json.loads(sys.argv[2]).items():
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            exec(code, {})
        except Exception:
            traceback.print_exc(file=sys.stdout)
    found[name] = printed.getvalue().strip()
print(json.dumps(found))
"""


def example(section: str) -> str:
    """The Python of a section of the page."""
    text = PAGE.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return code


def link(source: Path, copy: Path, files: dict[str, str]) -> None:
    """A copy of a folder, by links, with more files: their text by their path in it."""
    copy.mkdir()
    rooms = {name.split("/")[0] for name in files if "/" in name}
    for entry in source.iterdir():
        if entry.name not in (*rooms, "__pycache__"):
            (copy / entry.name).symlink_to(entry)
    for room in rooms:
        inside = {name.split("/", 1)[1]: text for name, text in files.items() if name.startswith(f"{room}/")}
        # cache/ and kernels/ lie beside the package, and are imported under it
        link(source / room if (source / room).is_dir() else ROOT / room, copy / room, inside)
    for name in files.keys() - {name for name in files if "/" in name}:
        (copy / name).write_text(files[name])


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the code of each walk prints, or its traceback, in one process that imports the package with their files."""
    folder = tmp_path_factory.mktemp("walks")
    files = {
        "kernels/divergences/hellinger.py": example("A divergence"),
        "kernels/features/losses/l1.py": example("A feature loss"),
        "cache/stores/sqlite.py": example("A store"),
    }
    link(ROOT / "fastkd", folder / "fastkd", files)
    codes = {"divergence": DIVERGENCE, "feature loss": FEATURE_LOSS, "store": STORE}
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", WALKS, str(folder / "cache.db"), json.dumps(codes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    printed: dict[str, str] = json.loads(done.stdout)
    return printed


def test_a_divergence_is_one_file(said: dict[str, str]) -> None:
    pytest.importorskip("triton")
    assert said["divergence"] == "['reference', 'torch', 'triton'] hellinger"


def test_a_feature_loss_is_one_file(said: dict[str, str]) -> None:
    assert said["feature loss"] == "True 2:1:l1:0.1"


def test_a_store_is_one_file(said: dict[str, str]) -> None:
    assert said["store"] == "True True"


def test_a_loss_of_ones_own_is_in_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastkd.bench import logits_problem
    from fastkd.bench.harness import Rotation
    from fastkd.bench.table import load
    from fastkd.cli.main import main

    monkeypatch.chdir(tmp_path)
    # three inputs, however small they are
    monkeypatch.setattr(logits_problem, "rotation", lambda make, size, device: Rotation([make() for _ in range(3)]))
    exec(compile(example("Your own loss in the comparison"), "my_loss.py", "exec"), {"__name__": "__main__"})
    (found,) = load(tmp_path / "mine.json")
    rows = [(row.line, row.at["V"], row.ratio is None) for row in found.rows]
    assert rows == [(name, v, name == "limit") for v in (2000, 4000) for name in ("limit", "kd_loss", "mine")]
    assert all(row.value_range is not None for row in found.rows)
    assert main(["bench", "--use", "mine.json", "--page", "mine.html"]) == 0
    assert ">mine</li>" in (tmp_path / "mine.html").read_text(encoding="utf-8")


def test_the_files_that_the_page_names_are_there() -> None:
    for folder in (
        "kernels/divergences",
        "kernels/features/losses",
        "cache/stores",
        "fastkd/teachers",
        "fastkd/train",
        "fastkd/report/sections",
    ):
        assert f"`{folder}/NAME.py`" in PAGE.read_text()
        assert (ROOT / folder / "__init__.py").exists()
