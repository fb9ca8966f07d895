"""What is said before a training, the batch of small data, and runs from before that are resumed with what they had."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import train_cases
from train_cases import SMALL, documents, make_cache

import fastkd
from fastkd.cache import Cache
from fastkd.errors import TrainError
from fastkd.evaluate.result import Windows
from fastkd.settings import LiveSettings, TrainSettings
from fastkd.train.batch import DEFAULT, Size, chosen_batch, with_batch
from fastkd.train.begun import begun_with, continued
from fastkd.train.outline import HeldOutSize, Outline, outline_of
from fastkd.train.result import report_of
from fastkd.train.settings_check import check_settings, doubtful
from fastkd.utils.intervals import NO_INTERVAL
from fastkd.utils.progress import Progress
from fastkd.utils.signals import Stop

STUDENT = "train_cases:tiny"
CHANGES: dict[str, Any] = {**SMALL, "batch_tokens": None, "steps": 3, "evaluate_every": 2}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("outline") / "cache", documents(200))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (Size(35_563, 20, 2048), 2048),  # a whole sequence
        (Size(35_563, 600, 60), 1024),
        (Size(300_000, 150, 2048), 2048),
        (Size(1_000_000, 500, 2048), 8192),
        (Size(1_638_400, 800, 2048), DEFAULT),
        (Size(10**9, 10**6, 2048), DEFAULT),
        (Size(10**9, 10**6, 32_768), 32_768),  # with less, no step could be made
        (Size(200, 1, 200), 1024),
        (Size(14_376, 1797, 8, copies=8), 256),  # 32 examples
        (Size(50_000, 50_000, 1, copies=1), 256),
    ],
)
def test_small_data_have_a_smaller_batch(size: Size, expected: int) -> None:
    assert chosen_batch(size) == expected
    assert with_batch(TrainSettings(), size, {}).batch_tokens == expected
    assert with_batch(TrainSettings(batch_tokens=70), size, {}).batch_tokens == 70
    assert with_batch(TrainSettings(batch_size=4), size, {}).batch_tokens == DEFAULT
    assert with_batch(TrainSettings(), size, {"batch_tokens": 512}).batch_tokens == 512
    assert with_batch(TrainSettings(), None, {}).batch_tokens == DEFAULT


def test_the_outline() -> None:
    held = HeldOutSize(12, 4312, 8)
    found = outline_of(TrainSettings(batch_tokens=2048, epochs=2), 17, held_out=held)
    assert found.lines == [
        "training: 34 steps of about 2,048 positions, 2 epochs",
        "evaluations: 12, after every 3 steps, on 8 held-out documents, 12 windows, 4,312 positions",
        "warning: 34 steps are few to learn from, and a comparison after fewer than 50 says little. --epochs 6 makes "
        "102; more data are better still.",
    ]
    assert found.to_json() == {
        "steps": 34, "steps_per_epoch": 17, "batch": "about 2,048 positions", "evaluations": 12, "evaluate_every": 3,
        "held_out": {"documents": 8, "windows": 12, "positions": 4312}, "no_evaluations": None,
        "warnings": found.warnings,
    }  # fmt: skip
    one = outline_of(TrainSettings(), 1, held_out=held).warnings
    assert one[0].startswith("warning: 1 step is too little to learn from, and")
    enough = outline_of(TrainSettings(batch_size=1, steps=50, evaluate_every=60), 200, why="nothing was held out.")
    assert enough.lines == [
        "training: 50 steps of 1 sequence, less than one epoch",
        "evaluations: none, as nothing was held out",
    ]
    given = outline_of(TrainSettings(steps=4, epochs=15.0), 3, held_out=held).warnings
    assert given == [
        "warning: --steps 4 counts, and --epochs 15 does not.",
        "warning: 4 steps are few to learn from, and a comparison after fewer than 50 says little. --steps 100 is 33.3 "
        "times the data; more data are better still.",
    ]
    small = outline_of(TrainSettings(batch_tokens=1024), 1, size=Size(40, 2, 20), held_out=held)
    assert small.lines[0] == "training: 1 step of 40 positions, 1 epoch"
    few = outline_of(TrainSettings(batch_size=64, batch_tokens=1024), 1, size=Size(40, 2, 20), held_out=held)
    assert few.lines[0] == "training: 1 step of 2 sequences, 1 epoch"
    assert Outline(5, 5, "", 10).evaluations == Outline(10, 5, "", 10).evaluations == 1
    assert Outline(11, 5, "", 10).evaluations == 2
    assert str(HeldOutSize(1, 1)) == "1 held-out window, 1 position"
    images = HeldOutSize(359, 2872, 359, "example")
    assert HeldOutSize(**images.to_json()) == images
    assert str(images) == "2,872 held-out copies of 359 examples"


def test_doubtful_values(cache: Cache) -> None:
    def said(**changes: Any) -> str:
        return " ".join(doubtful(TrainSettings(**changes), cache.spec))

    assert "temperature 8 is above the highest at which tails are stored, 4" in said(temperature=8.0)
    assert "temperature 8 is above" in said(temperature_end=8.0)
    assert "rate 10 is very high" in said(rate=10.0)
    assert "rate 0 trains nothing" in said(rate=0.0)
    assert not said() + said(temperature=4.0) + said(temperature=8.0, alpha=1.0) + said(temperature=3.0)
    assert not doubtful(TrainSettings(temperature=8.0), None)


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0.0}, {"batch_tokens": 0}, {"batch_size": 0}, {"micro_tokens": 0}, {"max_positions": 0},
        {"evaluate_positions": 0}, {"skip": -1}, {"threads": 0}, {"shards_open": 0}, {"seed": -1},
        {"adam_betas": (0.9, 1.0)}, {"adam_eps": 0.0},
    ],
)  # fmt: skip
def test_values_that_are_not_possible(change: dict[str, Any]) -> None:
    ((name, value),) = change.items()
    with pytest.raises(TrainError, match=f"{name}: got "):
        check_settings(TrainSettings(**change), None)
    assert value is not None


def test_a_training_says_what_it_does_and_stores_its_batch(cache: Cache, tmp_path: Path) -> None:
    events: list[Any] = []
    report = fastkd.train(STUDENT, cache, tmp_path / "run", control=True, progress=events.append, **CHANGES)
    (first,) = [event for event in events if event["event"] == "training"]
    assert first["text"].startswith("training: 3 steps of about 1,024 positions")
    assert first["evaluations"] == 2
    held = first["held_out"]
    assert report.held_out == report.to_json()["held_out"] == held
    assert held["documents"] == 40
    texts = [event.get("text", "") for event in events]
    assert sum(text.startswith("warning: 3 steps are few") for text in texts) == 1, "of the control, it is the same"
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["settings"]["batch_tokens"] == 1024
    assert run["report"]["held_out"] == held
    text = report_of(report)
    difference = report.verdicts["control"].difference["cross_entropy"]
    assert f"{difference.mean:+.4f} ± {difference.half:.4f}" in text.split("against control")[0]
    size = f"40 held-out documents, {held['windows']:,} windows, {held['positions']:,} positions"
    assert f"measured on {size}; differences ±" in text
    assert "note: 3 steps are few" in text
    assert "\nece: Expected calibration error" in text.split("against control")[0]


def test_a_run_from_before_keeps_its_batch(cache: Cache, tmp_path: Path) -> None:
    """It was begun with 16,384 positions, the default of old, and is resumed without an option."""
    stop = Stop()

    def ask(event: Any) -> None:
        stop.asked = stop.asked or event["event"] == "progress"

    begun = fastkd.train(STUDENT, cache, tmp_path, stop=stop, progress=ask, **{**CHANGES, "batch_tokens": DEFAULT})
    assert 0 < begun.step < 3
    (tmp_path / "run.json").unlink()
    assert begun_with([tmp_path / "none", tmp_path]) == {"batch_tokens": DEFAULT}
    report = fastkd.train(STUDENT, cache, tmp_path, **CHANGES)
    assert report.resumed == begun.step
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["batch_tokens"] == DEFAULT
    # without checkpoints, the run answers
    for folder in (tmp_path / "checkpoints").iterdir():
        (folder / "state.json").unlink()
    assert begun_with([tmp_path]) == {"batch_tokens": DEFAULT}
    assert fastkd.train(STUDENT, cache, tmp_path, **CHANGES).resumed == 3


@pytest.mark.parametrize(
    "text", ['{"settings": "x", "live": [1]}', '{"settings": [], "live": {"identity": 5}}', "[]", "{"]
)
def test_a_damaged_run_json_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    assert begun_with([tmp_path]) == {}


def test_a_live_run_from_before_keeps_its_split(tmp_path: Path) -> None:
    live = {"k": 6, "draws": 3, "context": 16, "shard_positions": 48}
    how: dict[str, Any] = {"teacher": train_cases.Tiny(seed=7), "data": documents(), **SMALL, "steps": 2}
    old = LiveSettings(**live, held_out=0.01)
    fastkd.train(STUDENT, out=tmp_path, live=old, **{**how, "steps": 2, "checkpoint_every": 1})
    assert begun_with([tmp_path])["held_out"] == 0.01
    assert continued(LiveSettings(), begun_with([tmp_path])).held_out == 0.01
    assert continued(LiveSettings(held_out=0.3), begun_with([tmp_path])).held_out == 0.3
    assert continued(LiveSettings(), {"held_out": 0.2}).held_out is None
    again = fastkd.train(STUDENT, out=tmp_path, live=LiveSettings(**live), **{**how, "checkpoint_every": 1})
    assert again.resumed == 2


def test_a_live_run_from_before_keeps_its_context(tmp_path: Path) -> None:
    live = LiveSettings(k=6, draws=3, shard_positions=4096, context=2048)
    how: dict[str, Any] = {"teacher": train_cases.Tiny(seed=7), "data": documents(), **CHANGES, "batch_tokens": 2048}
    fastkd.train(STUDENT, out=tmp_path, live=live, **{**how, "steps": 1})
    assert begun_with([tmp_path])["context"] == 2048
    assert continued(replace(live, context=None), begun_with([tmp_path])).context == 2048
    assert continued(LiveSettings(packing="keep"), begun_with([tmp_path])).context is None
    again = fastkd.train(STUDENT, out=tmp_path, live=replace(live, context=None), **{**how, "steps": 1})
    assert again.resumed == 1


def test_why_there_is_no_interval(cache: Cache, tmp_path: Path) -> None:
    """A single window: no verdict, and no sign of infinity anywhere."""
    first = int(cache.manifest.column("positions").to_numpy()[-1])
    changes = {**CHANGES, "evaluate_positions": min(first, 16)}
    report = fastkd.train(STUDENT, cache, tmp_path / "run", control=True, **changes)
    assert report.verdicts["control"].windows == 1
    assert report.verdicts["control"].overall == "not known"
    text = report_of(report)
    assert f"differences have {NO_INTERVAL}" in text
    assert "against control: not known (cross_entropy " in text
    assert "inf" not in text.replace("information", "")
    found = report.to_json()["verdicts"]["control"]["difference"]["cross_entropy"]
    assert (found["low"], found["high"], found["why"], found["verdict"]) == (None, None, NO_INTERVAL, "not known")
    summary = json.loads((tmp_path / "run" / "evaluation.json").read_text())["summary"]
    assert summary["perplexity"]["why"] == summary["accuracy"]["why"] == NO_INTERVAL
    assert Windows.from_json(json.loads((tmp_path / "run" / "evaluation.json").read_text())["student"]).counts.sum() > 0


def test_why_there_is_no_comparison(tmp_path: Path) -> None:
    none = make_cache(tmp_path / "cache", held_out=0.0)
    report = fastkd.train(STUDENT, none, tmp_path / "run", control=True, **{**CHANGES, "evaluate_every": None})
    assert "were held out." in report.not_compared
    assert f"not compared: {report.not_compared}" in report_of(report)
    assert report.to_json()["not_compared"] == report.not_compared


def test_the_last_line_of_progress_has_the_last_losses(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[dict[str, float]] = []
    add = Progress.add

    def seen(progress: Progress, units: int, **seconds: float) -> None:
        shown.append({name: value for name, (value, _) in progress._figures.items()})
        add(progress, units, **seconds)

    monkeypatch.setattr(Progress, "add", seen)
    fastkd.train(STUDENT, cache, tmp_path / "run", **CHANGES)
    records = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    losses = [record["loss"] for record in records if "loss" in record]
    last = [figures["loss"] for figures in shown if "loss" in figures][-1]
    assert last == losses[-1] != losses[-2]
