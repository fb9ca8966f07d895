"""However a step is divided over micro-batches and processes, the weights come out as those of one process."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import train_jobs
from torch import Tensor
from train_cases import SMALL, make_cache, write_version_1

from fastkd.models.hub import load_transformers
from fastkd.train.checkpoint import newest
from fastkd.train.metrics import read_metrics

TINY = "train_cases:double"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache; and what one process makes of it in ten steps, each of one micro-batch, with two evaluations."""
    folder = tmp_path_factory.mktemp("distributed")
    make_cache(folder / "cache")
    train_jobs.train(TINY, folder / "cache", folder / "one", SMALL | {"micro_tokens": 1000, "evaluate_every": 5})
    return folder


def weights(run: Path, name: str = "model") -> dict[str, Tensor]:
    found = newest(run)
    assert found is not None
    assert found.step == SMALL["steps"]
    return found.tensors(name)


def assert_same(ours: Path, theirs: Path, tolerance: float) -> None:
    a, b = weights(ours), weights(theirs)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_accumulation(place: Path) -> None:
    train_jobs.train(TINY, place / "cache", place / "parts", SMALL | {"micro_tokens": 16})
    assert_same(place / "parts", place / "one", 1e-9)


def test_ddp_and_fsdp(place: Path) -> None:
    """Of two processes that have unequal parts of each step, and several micro-batches; FSDP2's processes evaluate
    together what each has a part of."""
    changes = SMALL | {"evaluate_every": 5}
    runs = [(TINY, place / "cache", place / kind, changes | {"parallel": kind}) for kind in ("ddp", "fsdp")]
    train_jobs.run(train_jobs.train_all, runs, ranks=2)
    train_jobs.run(train_jobs.count, place / "cache", place, SMALL, ranks=2)
    counts = [(place / f"counts-{rank}").read_text().split() for rank in range(2)]
    assert sum(a != b for a, b in zip(*counts, strict=True)) > 5
    for kind in ("ddp", "fsdp"):
        assert_same(place / kind, place / "one", 1e-9)
    ours, *others = (
        [line["evaluation"] for line in read_metrics(place / kind) if "evaluation" in line]
        for kind in ("one", "ddp", "fsdp")
    )
    assert len(ours) == 2
    for theirs in others:
        assert [pytest.approx(line, rel=1e-6) for line in ours] == theirs


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.soak), 3])
def test_an_evaluation_is_divided_and_comes_to_the_same(place: Path, tmp_path: Path, ranks: int) -> None:
    """Bit by bit, as each process makes micro-batches that one alone would make; and each makes its part of them."""
    for count in (1, ranks):
        train_jobs.run(train_jobs.measure, place / "cache", tmp_path, 32, ranks=count)
    whole, one = json.loads((tmp_path / "1-0.json").read_text())
    calls = []
    for rank in range(ranks):
        made, found = json.loads((tmp_path / f"{ranks}-{rank}.json").read_text())
        calls.append(made)
        for name in ("seconds", "timed_positions"):
            found[name] = one[name]
        assert found == one
    assert sum(calls) == whole
    assert max(calls) <= -(-whole // ranks) + 1


def test_fewer_steps_than_processes_are_made_by_each(place: Path, tmp_path: Path) -> None:
    train_jobs.run(train_jobs.measure, place / "cache", tmp_path, 100_000, ranks=2)
    ours, theirs = (json.loads((tmp_path / f"2-{rank}.json").read_text()) for rank in range(2))
    assert ours[0] == theirs[0]
    assert ours[1]["student"] == theirs[1]["student"]


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.soak), "fsdp"])
def test_a_model_of_transformers_whose_head_is_its_embedding(place: Path, tmp_path: Path, kind: str) -> None:
    """Head and embedding are in one part of FSDP2's, and layers in others; the loss reads the head within forward."""
    changes: dict[str, Any] = SMALL | {"rate": 1e-3}
    student = "train_cases:tied_llama"
    train_jobs.train(student, place / "cache", tmp_path / "one", changes)  # here, where transformers is imported
    train_jobs.run(train_jobs.train, student, place / "cache", tmp_path / "two", changes | {"parallel": kind}, ranks=2)
    assert_same(tmp_path / "two", tmp_path / "one", 2e-5)
    loaded = load_transformers().AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "student")
    ours = weights(tmp_path / "two")
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, ours[f"model.{name}"]), name


@pytest.mark.parametrize(
    ("parallel", "before", "after"),
    [
        ("ddp", 2, 1),
        ("fsdp", 2, 3),
        *(
            pytest.param(*case, marks=pytest.mark.soak)
            for case in (("ddp", 2, 4), ("fsdp", 2, 1), ("fsdp", 2, 4), ("fsdp", 1, 2))
        ),
    ],
)
def test_another_number_of_processes_resumes(
    place: Path, tmp_path: Path, parallel: str, before: int, after: int
) -> None:
    changes = SMALL | {"parallel": parallel}
    train_jobs.run(train_jobs.train_and_stop, TINY, place / "cache", tmp_path, changes, 5, ranks=before)
    found = newest(tmp_path)
    assert found is not None
    assert 5 < found.step <= 7
    sizes = [size for path in found.folder.glob("*.distcp") if (size := path.stat().st_size)]
    assert len(sizes) == (before if parallel == "fsdp" else 1)
    if parallel == "fsdp" and before > 1:  # each process has written its own half
        assert max(sizes) < 0.7 * sum(sizes)
    train_jobs.run(train_jobs.train, TINY, place / "cache", tmp_path, changes, ranks=after)
    assert_same(tmp_path, place / "one", 1e-9)


def test_a_checkpoint_of_version_1_is_resumed_by_two_processes(place: Path, tmp_path: Path) -> None:
    """Written before torch.distributed.checkpoint was used."""
    changes = SMALL | {"parallel": "fsdp"}
    train_jobs.run(train_jobs.train_and_stop, TINY, place / "cache", tmp_path, changes, 5)
    found = newest(tmp_path)
    assert found is not None
    groups = {name: found.tensors(name) for name in ("model", "optimizer")}
    shutil.rmtree(found.folder)
    write_version_1(tmp_path, found.step, groups, found.state)
    train_jobs.run(train_jobs.train, TINY, place / "cache", tmp_path, changes, ranks=2)
    assert_same(tmp_path, place / "one", 1e-9)
