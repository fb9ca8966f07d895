"""Students that learn from each other on several processes, all on each or one each; and killed."""

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import train_jobs
from torch import Tensor
from train_cases import SMALL, bits, make_cache

from fastkd.train.checkpoint import newest
from fastkd.train.exchange import TEACHER
from fastkd.train.metrics import read_metrics

STUDENTS = {"a": "train_cases:double", "b": "train_cases:other_double"}
THREE = STUDENTS | {"c": "train_cases:third_double"}
STEPS = 6
CHANGES: dict[str, Any] = SMALL | {"k": 6, "steps": STEPS, "evaluate_every": STEPS, "clip": 0.5, "batch_tokens": 90}
EVERY = CHANGES | {"every": 2}
PAIR = {"learns": {"a": ("b", TEACHER), "b": ("a",)}}
RING = {"learns": {"a": ("b", "c"), "b": ("c",), "c": ()}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    make_cache(folder / "cache")
    return folder


def weights(run: Path) -> dict[str, Tensor]:
    found = newest(run)
    assert found is not None
    assert found.step == STEPS
    return found.tensors("model")


def assert_same(ours: Path, theirs: Path, students: dict[str, str]) -> None:
    """Weights, logs and evaluations, but for rounding."""
    a, b = weights(ours), weights(theirs)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    for mine, one in zip(read_metrics(ours), read_metrics(theirs), strict=True):
        assert mine.keys() == one.keys()
        if "evaluation" in mine:
            assert mine["evaluation"] == pytest.approx(one["evaluation"], rel=1e-5)
        for name in students if "loss" in mine else ():
            for part in ("loss", "hard", "soft", "grad_norm"):
                assert mine[f"{name}/{part}"] == pytest.approx(one[f"{name}/{part}"], rel=1e-5)
    for name in students:
        assert (ours / "students" / name / "model.safetensors").exists()
        assert (ours / f"evaluation-{name}.json").exists()


WAYS: dict[str, dict[str, Any]] = {"now": CHANGES | PAIR, "later": EVERY | PAIR}


@pytest.fixture(scope="module")
def alone(place: Path) -> dict[str, Path]:
    """Runs of one process."""
    for way, changes in WAYS.items():
        train_jobs.train(STUDENTS, place / "cache", place / way, changes)
    return {way: place / way for way in WAYS}


@pytest.mark.parametrize(
    "ways",
    [
        pytest.param({"now": "ddp", "later": "fsdp"}, id="now: ddp, later: fsdp"),
        pytest.param({"now": "fsdp", "later": "ddp"}, id="now: fsdp, later: ddp", marks=pytest.mark.soak),
    ],
)
def test_all_on_each_by_ddp_and_fsdp(ways: dict[str, str], place: Path, tmp_path: Path, alone: dict[str, Path]) -> None:
    runs = [
        (STUDENTS, place / "cache", tmp_path / way, WAYS[way] | {"parallel": parallel})
        for way, parallel in ways.items()
    ]
    train_jobs.run(train_jobs.train_all, runs, ranks=2)
    for way in ways:
        assert_same(tmp_path / way, alone[way], STUDENTS)


def test_one_on_each(place: Path, tmp_path: Path, alone: dict[str, Path]) -> None:
    """What travels is targets; with `every`, weights. Each process reads whole steps."""
    one = {"one_each": True}
    runs = [
        (STUDENTS, place / "cache", tmp_path / "now", WAYS["now"] | one | {"control": True}),
        (STUDENTS, place / "cache", tmp_path / "later", WAYS["later"] | one),
    ]
    train_jobs.run(train_jobs.train_all, runs, ranks=2)
    for way in WAYS:
        assert_same(tmp_path / way, alone[way], STUDENTS)
    for name in STUDENTS:
        assert (tmp_path / "now" / "control" / name / "run.json").exists()


def test_three_of_which_one_returns_logits(place: Path) -> None:
    changes = CHANGES | RING | {"draws": 0}
    train_jobs.train(THREE, place / "cache", place / "three", changes)
    each = [(THREE, place / "cache", place / "three-each", changes | {"one_each": True})]
    train_jobs.run(train_jobs.train_all, each, ranks=3)
    assert_same(place / "three-each", place / "three", THREE)


_SOAK = pytest.mark.soak


@pytest.mark.parametrize(
    ("before", "after", "changes"),
    [
        pytest.param("each", "one", EVERY | PAIR, id="later: each, one"),
        pytest.param("fsdp", "each", CHANGES | PAIR, id="now: fsdp, each"),
        pytest.param("each", "one", CHANGES | PAIR, id="now: each, one", marks=_SOAK),
        pytest.param("one", "each", CHANGES | PAIR, id="now: one, each", marks=_SOAK),
        pytest.param("one", "each", EVERY | PAIR, id="later: one, each", marks=_SOAK),
        pytest.param("fsdp", "each", EVERY | PAIR, id="later: fsdp, each", marks=_SOAK),
    ],
)
def test_a_run_goes_on_in_another_way(
    before: str, after: str, changes: dict[str, Any], place: Path, tmp_path: Path, alone: dict[str, Path]
) -> None:
    ways: dict[str, dict[str, Any]] = {"one": {}, "each": {"one_each": True}, "fsdp": {"parallel": "fsdp"}}
    ranks = {"one": 1, "each": 2, "fsdp": 2}
    out, stopping = tmp_path / "run", changes | {"checkpoint_every": 2}
    dying = train_jobs.start(
        train_jobs.train_and_die, STUDENTS, place / "cache", out, stopping | ways[before], 30, 0, ranks=ranks[before]
    )
    assert train_jobs.finish(dying)[0] == -signal.SIGKILL
    found = newest(out)
    assert found is not None
    assert 0 < found.step < STEPS
    train_jobs.run(train_jobs.train, STUDENTS, place / "cache", out, stopping | ways[after], ranks=ranks[after])
    assert_same(out, alone["later" if "every" in changes else "now"], STUDENTS)


def result(run: Path, steps: int) -> dict[str, Any]:
    found: dict[str, Any] = bits(run, steps)
    for name in STUDENTS:
        found[name] = (run / "students" / name / "model.safetensors").read_bytes()
    lines = [line for line in read_metrics(run) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    for part in ("loss", "a/hard", "b/soft", "a/grad_norm"):
        found[part] = repr([line[part] for line in lines]).encode()
    assert not [path for path in run.rglob(".*") if path.name != ".metadata"]
    return found


KILLED: dict[str, Any] = CHANGES | PAIR | {"steps": 4, "checkpoint_every": 1, "evaluate_every": 0}


@pytest.mark.parametrize(
    ("ranks", "changes", "moments"),
    [(1, KILLED, (19,)), (1, KILLED | {"every": 2, "draws": 2}, (30,)), (2, KILLED | {"one_each": True}, (27,))],
    ids=["now", "later", "each"],
)
def test_killed(ranks: int, changes: dict[str, Any], moments: tuple[int, ...], place: Path, tmp_path: Path) -> None:
    _killed(ranks, changes, moments, place, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("ranks", "changes"),
    [(1, KILLED), (1, KILLED | {"every": 2, "draws": 2}), (2, KILLED | {"one_each": True})],
    ids=["now", "later", "each"],
)
def test_killed_at_every_moment(ranks: int, changes: dict[str, Any], place: Path, tmp_path: Path) -> None:
    assert _killed(ranks, changes, range(1, 1000), place, tmp_path) > 20


def _killed(ranks: int, changes: dict[str, Any], moments: Any, place: Path, tmp_path: Path) -> int:
    arguments = (STUDENTS, place / "cache", tmp_path / "whole", changes)
    train_jobs.run(train_jobs.train, *arguments, ranks=ranks)
    wanted, count = result(tmp_path / "whole", 4), 0
    for moment in moments:
        arguments = (STUDENTS, place / "cache", out := tmp_path / str(moment), changes)
        statuses = train_jobs.finish(train_jobs.start(train_jobs.train_and_die, *arguments, moment, 0, ranks=ranks))
        if statuses == [0] * ranks:
            break
        assert statuses[0] == -signal.SIGKILL
        train_jobs.run(train_jobs.train, *arguments, ranks=ranks)
        assert result(out, 4) == wanted, f"killed at moment {moment}"
        shutil.rmtree(out)
        count += 1
    return count
