"""The demo of handwritten digits, on a few of them: what it leaves, what it takes up again, and what it refuses."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastkd.cache import CacheError, open_cache
from fastkd.cli.main import main
from fastkd.demo import digits as demo
from fastkd.demo.digits_inputs import (
    DEGREES,
    HELD_OUT,
    PIXELS,
    Net,
    augment,
    digits,
    new_net,
    train_teacher,
    training_digits,
)
from fastkd.errors import DataError
from fastkd.evaluate.measures import CLASSIFIER_DEMO, printed_in
from fastkd.models.module import parameters_and_bytes
from fastkd.report.runs import read_runs
from fastkd.settings import DemoSettings
from fastkd.stream.split import open_split
from fastkd.train.trainer import Trainer
from fastkd.utils.signals import Stop, Stopped
from fastkd.utils.splitmix import mixed

SHOWN = {measure.name for measure in printed_in(CLASSIFIER_DEMO)}
FEW = demo.Sizes(images=300, copies=4, teacher_width=8, teacher_epochs=2, student_width=2, epochs=2)


def settings(out: Path, **changes: Any) -> DemoSettings:
    return DemoSettings(task="digits", out=out, **changes)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo that was run to its end."""
    out = tmp_path_factory.mktemp("digits")
    demo.run(settings(out), sizes=FEW)
    return out


def result(out: Path) -> list[bytes]:
    """The weights of teacher, student and control."""
    student = out / "digits" / "student"
    names = [out / "digits" / "teacher.safetensors"]
    names += [run / "student" / "model.safetensors" for run in (student, student / "control", out / "digits" / "live")]
    names += [out / "digits" / "pair" / "students" / name / "model.safetensors" for name in ("first", "second")]
    return [name.read_bytes() for name in names]


def test_what_it_leaves(place: Path) -> None:
    report = json.loads((place / "digits" / "report.json").read_text())
    assert report["trained_now"]
    assert report["captured_now"] == report["positions"] == 300 * 4
    assert report["held_out"] == 60
    scores = report["scores"]
    assert {name: set(s) for name, s in scores.items()} == {
        "teacher": SHOWN,
        "student": SHOWN,
        "without features": SHOWN,
        "control": SHOWN,
    }
    for other in ("control", "without features"):
        for name, difference in report[f"student_minus_{other.replace(' ', '_')}"].items():
            expected = scores["student"][name]["mean"] - scores[other][name]["mean"]
            assert difference["mean"] == pytest.approx(expected, abs=1e-9)
    mean, half = (report["student_minus_without_features"]["cross_entropy"][name] for name in ("mean", "half"))
    assert report["features"] == ("no difference" if abs(mean) <= half else "helped" if mean < 0 else "hurt")
    feature = open_cache(place / "digits" / "cache").features[demo.FEATURE]
    assert feature.spec.shape == (4 * FEW.teacher_width, 4, 4)
    assert len(feature.shards) == len(open_cache(place / "digits" / "cache").shards)
    model = Net(FEW.teacher_width)
    data = digits(0, images=300, copies=4)
    kept, new = demo.load_or_train_teacher(place / "digits" / "teacher.safetensors", data, FEW, 0, demo.Stages())
    assert not new
    assert report["teacher"]["parameters"] == sum(p.numel() for p in model.parameters())
    # the teacher's row against the teacher itself, on the digits that are held out
    apart = np.setdiff1d(np.arange(300), training_digits(data, 0))
    copies = np.tile(np.arange(4), len(apart))
    numbers = np.repeat(apart, 4)
    with torch.no_grad():
        said = kept(data.read(numbers, data.seeds(numbers, copies)))
    labels = torch.from_numpy(data.labels(numbers))
    assert scores["teacher"]["cross_entropy"]["mean"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(said, labels)), abs=0.01
    )
    assert scores["teacher"]["accuracy"]["mean"] == pytest.approx(
        float((said.argmax(1) == labels).float().mean()), abs=0.02
    )
    page = (place / "digits" / "report.html").read_text()
    assert "student, control" in page
    assert "student, without features" in page
    assert "Did the features help?" in page
    assert "of the split" not in page  # but held out
    assert "onnx int8" in page
    deployed = report["deployed"]["rows"][1]
    assert deployed["quality"]["positions"] == 60 * 4
    assert deployed["quality"]["exported"]["student_agreement"]["mean"] > 0.9
    text = demo.text_of(report, read_runs([place / "digits" / "student"]))
    assert "1,200 augmented digits cached" in text
    assert f"bytes each, and {report['feature_bytes'] / 1200:.0f} of feature maps" in text
    assert "the teacher ran on 1,200" in text
    assert "student - control" in text
    assert "student - without features" in text
    assert f"the features by cross-entropy: {report['features']}" in text


def test_teachers_beside_the_student(place: Path) -> None:
    """The student is the one from the cache, the cache the capture's; and two students teach each other."""
    out = place / "digits"
    report = json.loads((out / "report.json").read_text())
    assert report["live_is_the_cached_student"]
    cached, written = open_cache(out / "cache"), open_cache(out / "live-cache")
    assert written.sealed
    assert [written.content(i) for i in written.shards] == [cached.content(i) for i in cached.shards]
    first, control = report["pair"]["first"], report["scores"]["control"]
    for name, difference in report["pair_first_minus_control"].items():
        assert difference["mean"] == pytest.approx(first[name]["mean"] - control[name]["mean"], abs=1e-9)
    assert set(report["pair"]["second"]) == SHOWN
    text = demo.text_of(report, read_runs([out / "student"]))
    assert "the same weights, bit for bit" in text
    assert f"{report['pair_first_minus_control']['cross_entropy']['mean']:+.3f}" in text
    page = (out / "report.html").read_text()
    assert "pair, first" in page
    assert "pair, ensemble" in page


def test_a_second_run_starts_from_the_cache(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = result(place)
    report, text = demo.run(settings(place), sizes=FEW)
    said = capsys.readouterr().err
    assert "teacher.safetensors is reused" in said
    assert "the cache is complete, the teacher did not run" in said
    assert "the students are reused" in said
    assert "onnx-int8 is reused" in said
    assert not report["trained_now"]
    assert report["captured_now"] == 0
    assert "the teacher did not run" in text
    assert result(place) == before


@pytest.mark.parametrize(
    "runs",
    [
        ("without_features", "pair"),
        pytest.param(("student", "without_features", "control", "live", "pair"), marks=pytest.mark.soak),
    ],
    ids=["some", "every"],
)
def test_interrupted_it_goes_on(
    runs: tuple[str, ...], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the capture, and in each training; the bytes are those of a run that was not."""
    stop = Stop()
    stop()
    with pytest.raises(Stopped):
        demo.run(settings(tmp_path), stop, sizes=FEW)
    assert (tmp_path / "digits" / "teacher.safetensors").exists()
    take = Trainer._take
    for run in runs:
        stop = Stop()

        def taken(self: Trainer, *given: Any, stop: Stop = stop, run: str = run, **more: Any) -> None:
            take(self, *given, **more)
            if self.step == 7 and self._out.name == run:
                stop()

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_take", taken)
            with pytest.raises(Stopped):
                demo.run(settings(tmp_path), stop, sizes=FEW)
        assert not (tmp_path / "digits" / "report.html").exists()
    report = demo.run(settings(tmp_path), sizes=FEW).report
    assert report["captured_now"] == 0
    assert result(tmp_path) == result(place)


def test_the_teacher_never_saw_what_is_held_out(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, data = open_cache(place / "digits" / "cache"), digits(0, images=300, copies=4)
    table = open_split(cache, "held_out")
    apart = {n for index in table.shard for n in cache.read_shard(int(index))["example"].tolist()}
    assert len(apart) == 300 * HELD_OUT
    asked: set[int] = set()
    read = type(data).read

    def noted(self: Any, numbers: Any, seeds: Any) -> Any:
        asked.update(numbers.tolist())
        return read(self, numbers, seeds)

    monkeypatch.setattr(type(data), "read", noted)
    train_teacher(2, data, 0, epochs=1)
    assert asked == set(range(300)) - apart


def test_another_seed_is_another_demo(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place, tmp_path / "copy")
    with pytest.raises(CacheError, match="written with other settings"):
        demo.run(settings(tmp_path / "copy", seed=1), sizes=FEW)


def test_a_damaged_cache_is_named_and_not_training_digits(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "digits" / "cache", tmp_path / "digits" / "cache")
    shutil.copy(place / "digits" / "teacher.safetensors", tmp_path / "digits")
    shard = min((tmp_path / "digits" / "cache" / "shards").iterdir())
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CacheError, match=r"shard 0.*Nothing was trained"):
        demo.run(settings(tmp_path), sizes=FEW)


def test_a_damaged_teacher_is_trained_anew(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, data = tmp_path / "teacher.safetensors", digits(0, images=300, copies=4)
    path.write_bytes(b"not one")
    _, new = demo.load_or_train_teacher(path, data, FEW, 0, demo.Stages())
    assert new
    assert "cannot be read" in capsys.readouterr().err
    assert path.read_bytes() == result(place)[0]
    _, new = demo.load_or_train_teacher(path, data, replace(FEW, teacher_epochs=1), 0, demo.Stages())
    assert new
    assert "has other settings" in capsys.readouterr().err


def test_settings_of_the_other_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--task", "digits", "--out", str(tmp_path), "--window", "64"]) == 1
    assert "window: got 64, but the task digits has no such setting" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "Sizes", lambda: replace(FEW, images=60, epochs=1, teacher_epochs=1))
    assert main(["demo", "--task", "digits", "--out", str(tmp_path), "--seed", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["settings"]["seed"] == 3
    assert report["positions"] == 240


def test_a_student_is_a_tenth_of_its_teacher() -> None:
    sizes = demo.Sizes()
    teacher, student = (parameters_and_bytes(new_net(w, 0))[0] for w in (sizes.teacher_width, sizes.student_width))
    assert 0.09 < student / teacher < 0.1


def test_moved_against_a_loop_written_out() -> None:
    images = torch.rand(40, 1, 8, 8)
    seeds = np.arange(40, dtype=np.int64) * 2**57 + 3
    found = augment(images, seeds)
    angles, shifts = [], []
    for image, seed, ours in zip(images[:, 0].numpy(), seeds.tolist(), found[:, 0].numpy(), strict=True):
        angle, dx, dy = parameters_of(seed)
        angles.append(angle)
        shifts += [dx, dy]
        expected = np.zeros((8, 8))
        for row in range(8):
            for column in range(8):
                # around the middle, in pixels
                y, x = row - 3.5, column - 3.5
                from_x = np.cos(angle) * x - np.sin(angle) * y + dx + 3.5
                from_y = np.sin(angle) * x + np.cos(angle) * y + dy + 3.5
                for r in (int(np.floor(from_y)), int(np.floor(from_y)) + 1):
                    for c in (int(np.floor(from_x)), int(np.floor(from_x)) + 1):
                        if 0 <= r < 8 and 0 <= c < 8:
                            expected[row, column] += (1 - abs(from_y - r)) * (1 - abs(from_x - c)) * image[r, c]
        np.testing.assert_allclose(ours, expected, atol=1e-5)
    for values, most in ((np.rad2deg(angles), DEGREES), (np.array(shifts), PIXELS)):
        assert np.abs(values).max() <= most
        assert values.min() < -most / 2
        assert values.max() > most / 2


def parameters_of(seed: int) -> tuple[float, float, float]:
    """Angle in radians, and shifts in pixels."""
    words = mixed(np.uint64(seed) ^ mixed(np.arange(3, dtype=np.uint64)))
    turn, dx, dy = ((int(w) >> 11) / 2**52 - 1 for w in words)
    return float(np.deg2rad(DEGREES * turn)), PIXELS * dx, PIXELS * dy


def test_an_image_is_moved_the_same_whatever_stands_beside_it() -> None:
    images, seeds = torch.rand(64, 1, 8, 8), np.arange(64, dtype=np.int64) ** 5
    whole = augment(images, seeds)
    for some in (slice(0, 1), slice(3, 10), slice(63, 64)):
        assert torch.equal(augment(images[some], seeds[some]), whole[some])


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install 'fastkd\[digits\]'"):
        digits(0, images=10, copies=1)
