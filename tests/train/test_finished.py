"""The same call on a run that is complete: it answers from run.json, and only if it is the same."""

import importlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from train_cases import SMALL, VOCAB, documents, llama, make_cache, toy_objective

import fastkd
import fastkd.train.api as api
from fastkd.cache import Cache
from fastkd.errors import StreamError, TrainError
from fastkd.train.result import report_of

CHANGES: dict[str, Any] = {**SMALL, "steps": 3, "evaluate_every": 3}
STUDENT = "train_cases:tiny"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("finished") / "cache")


@pytest.fixture(scope="module")
def whole(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run with its control."""
    out = tmp_path_factory.mktemp("finished") / "run"
    fastkd.train(STUDENT, cache, out, control=True, **CHANGES)
    return out


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The students that were loaded."""
    found: list[Any] = []
    real = api.make_student
    monkeypatch.setattr(api, "make_student", lambda source, *args: (found.append(source), real(source, *args))[1])
    return found


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_nothing_is_loaded_and_the_report_is_the_same(
    cache: Cache, run: Path, made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of a call that resumes from the checkpoint. Checkpoints are not needed."""
    with monkeypatch.context() as patch:
        patch.setattr(api, "finished_report", lambda *args, **more: None)
        resumed = fastkd.train(STUDENT, cache, run, control=True, **CHANGES)
    assert len(made) == 2
    made.clear()
    shutil.rmtree(run / "checkpoints")
    os.remove(run / "student" / "README.md")
    before = contents(run)
    (run / "student" / ".README.md.1.part").write_text("of a process that was killed")
    answered = fastkd.train(STUDENT, cache, run, control=True, **CHANGES)
    assert not made
    after = contents(run)
    assert after.pop("student/README.md")
    assert after == before

    def without_times(report: fastkd.TrainReport) -> Any:
        found = report.to_json()
        for one in (found, found["control"]):
            assert one["positions"] == 0
            for name in ("seconds", "waiting"):
                del one[name]
        found.pop("verdicts")
        return found

    assert without_times(answered) == without_times(resumed)
    assert report_of(answered).splitlines()[1:] == report_of(resumed).splitlines()[1:]
    alone = fastkd.train(STUDENT, cache, run, **CHANGES)
    assert (alone.control, alone.verdicts, alone.evaluation) == (None, {}, answered.evaluation)


def test_what_differs_is_judged_as_always(cache: Cache, run: Path, made: list[Any], tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"rate: 0\.01 there, 0\.02 here"):
        fastkd.train(STUDENT, cache, run, **{**CHANGES, "rate": 0.02})
    with pytest.raises(StreamError, match="caches"):
        fastkd.train(STUDENT, make_cache(tmp_path / "other", documents(seed=3)), run, **CHANGES)
    with pytest.raises(TrainError, match="objective"):
        fastkd.train(STUDENT, cache, run, objective=toy_objective(0.1), **CHANGES)
    with pytest.raises(StreamError, match="caches"):
        fastkd.train(STUDENT, [(cache, 1), (cache, 2)], run, **CHANGES)
    made.clear()
    fastkd.train("train_cases:dropping", cache, run, **CHANGES)
    assert made == ["train_cases:dropping"]


def test_a_training_with_another_objective_is_not_answered(cache: Cache, tmp_path: Path, made: list[Any]) -> None:
    """Nor is a call without it on its run, which is refused."""
    fastkd.train(STUDENT, cache, tmp_path, objective=toy_objective(0.1), **CHANGES)
    with pytest.raises(TrainError, match="objective"):
        fastkd.train(STUDENT, cache, tmp_path, **CHANGES)
    made.clear()
    assert fastkd.train(STUDENT, cache, tmp_path, objective=toy_objective(0.1), **CHANGES).complete
    assert made


@pytest.mark.parametrize(
    "missing", ["student/model.safetensors", "evaluation.json", "run.json", "control/evaluation.json"]
)
def test_what_is_missing_is_made_again(missing: str, cache: Cache, run: Path, whole: Path, made: list[Any]) -> None:
    os.remove(run / missing)
    assert fastkd.train(STUDENT, cache, run, control=True, **CHANGES).complete
    assert made
    assert (run / missing).exists()
    if missing.endswith(".safetensors"):
        assert (run / missing).read_bytes() == (whole / missing).read_bytes()


def test_a_damaged_run_is_no_answer(cache: Cache, run: Path, made: list[Any]) -> None:
    document = json.loads((run / "run.json").read_text())
    document["report"]["evaluation"]["cross_entropy"] = 0.0
    (run / "run.json").write_text(json.dumps(document))
    assert fastkd.train(STUDENT, cache, run, control=True, **CHANGES).evaluation["cross_entropy"] > 0
    assert made


def test_a_student_whose_files_changed_is_looked_at_again(
    cache: Cache, tmp_path: Path, made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with another config, and another source of module:factory: both are refused, as when a run resumes."""
    monkeypatch.syspath_prepend(str(tmp_path))
    factory, folder = tmp_path / "my_students.py", tmp_path / "mine"
    factory.write_text("import train_cases\n\n\ndef make():\n    return train_cases.Tiny(seed=1)\n")
    folder.mkdir()
    (folder / "config.json").write_text(llama(vocab_size=VOCAB).to_json_string())
    for student in ("my_students:make", str(folder)):
        out = tmp_path / f"run of {student[-4:]}"
        fastkd.train(student, cache, out, **CHANGES)
        made.clear()
        fastkd.train(student, cache, out, **CHANGES)
        assert not made
        if student == str(folder):
            (folder / "config.json").write_text(llama(vocab_size=VOCAB, num_hidden_layers=1).to_json_string())
        else:
            factory.write_text(factory.read_text().replace("seed=1", "seed=1, bias=True"))
            sys.modules.pop("my_students")
            importlib.invalidate_caches()
        with pytest.raises(TrainError, match=r"is in (this|the checkpoint's) student"):
            fastkd.train(student, cache, out, **CHANGES)
