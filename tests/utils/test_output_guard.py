"""Nothing is written into a folder that holds something else."""

from pathlib import Path
from typing import Any

import pytest
from train_cases import CAPTURE, SMALL, Tiny, documents, make_cache

import fastkd
from fastkd.cache import CacheError
from fastkd.cache.stores import MemoryStore
from fastkd.cli import main as cli
from fastkd.errors import TrainError
from fastkd.utils.output_guard import check_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("places") / "cache"
    make_cache(folder)
    return folder


def test_capture(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("")
    with pytest.raises(CacheError, match=r"got 'thesis'; expected an empty folder, a new one, or that of a cache"):
        fastkd.capture(Tiny(), documents(), tmp_path, **CAPTURE)
    assert names(tmp_path) == ["chapter.tex", "thesis"]
    store = MemoryStore()
    store.create("other/object", b"")
    with pytest.raises(CacheError, match="got 'other'; expected"):
        fastkd.capture(Tiny(), documents(), store, **CAPTURE)


def test_train_and_sweep(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TrainError, match=r"got 'config\.json'; .* that of a run"):
        fastkd.train(Tiny(), cache, tmp_path, **SMALL)
    with pytest.raises(TrainError, match=r"got 'config\.json'; .* that of a sweep"):
        fastkd.sweep(Tiny(), cache, tmp_path, {"alpha": [0, 1]}, **SMALL)
    assert names(tmp_path) == ["config.json"]


def test_a_run_whose_control_comes_first(tmp_path: Path) -> None:
    (tmp_path / "control").mkdir()
    check_folder(tmp_path, "run")
    (tmp_path / "control" / "metrics.jsonl").write_text("")
    check_folder(tmp_path, "run")
    (tmp_path / "thesis").mkdir()
    with pytest.raises(TrainError, match=r"got 'thesis'; .* that of a run"):
        check_folder(tmp_path, "run")
    (tmp_path / "control" / "metrics.jsonl").rename(tmp_path / "control" / "chapter.tex")
    with pytest.raises(TrainError, match=r"control: got 'chapter\.tex'; .* that of a run"):
        check_folder(tmp_path, "run")


def test_a_sweep_that_failed_between_the_folders_of_an_arm_and_of_its_training(tmp_path: Path) -> None:
    (tmp_path / "alpha=0").mkdir()
    check_folder(tmp_path, "sweep")
    (tmp_path / "alpha=0" / "part.parquet").write_text("")
    with pytest.raises(TrainError, match=r"got 'alpha=0'; .* that of a sweep"):
        check_folder(tmp_path, "sweep")


def test_what_was_begun_there_and_logs_are_no_hindrance(cache: Path, tmp_path: Path) -> None:
    run, swept = tmp_path / "run", tmp_path / "sweep"
    settings: dict[str, Any] = SMALL | {"steps": 2}
    for out in (run, swept):
        out.mkdir()
        (out / "slurm-12.out").write_text("")
        (out / ".notes").write_text("")
    for _ in range(2):
        assert fastkd.train(Tiny(), cache, run, **settings).complete
        assert fastkd.sweep(Tiny(), cache, swept, {"alpha": [0, 1]}, seeds=1, **settings).complete
        (run / "mine.txt").write_text("")
        (swept / "sweep.json").unlink(missing_ok=True)  # as where it was killed before it came to its end
        (swept / "mine.txt").write_text("")


def test_the_commands(cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("one\ntwo\n")
    train = ["--student", "train_cases:tiny", "--cache", str(cache), "--out", str(tmp_path)]
    capture = ["--teacher", "absent:absent", "--data", str(tmp_path / "mine.txt"), "--out", str(tmp_path)]
    for command, arguments in (
        ("capture", capture),
        ("train", train),
        ("sweep", [*train, "--alpha", "0", "1"]),
        ("demo", ["--out", str(tmp_path)]),
    ):
        assert cli.main([command, *arguments]) == 1
        out, told = capfd.readouterr()
        assert out == ""
        kind = {"capture": "cache", "train": "run"}.get(command, command)
        assert told.startswith(f"fastkd: {tmp_path}: got 'mine.txt'; expected "), told
        assert f"that of a {kind}." in told
        assert told.count("\n") == 1
    assert names(tmp_path) == ["mine.txt"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    check_folder(tmp_path / "new" / "folder", "run")
    assert not (tmp_path / "new").exists()
