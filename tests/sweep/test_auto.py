"""Successive halving: rungs, which arms go on, that arms are the full runs, the choice, and kills."""

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from moments import Killed, Moments
from train_cases import SMALL, bits, documents, make_cache

import fastkd
from fastkd.cache import Cache, open_cache
from fastkd.cli.commands import Train
from fastkd.cli.main import main
from fastkd.cli.parse import parse
from fastkd.errors import StreamError, TrainError
from fastkd.evaluate.api import Evaluation, compare
from fastkd.settings import TrainSettings
from fastkd.sweep.arms import AUTO, auto_arms
from fastkd.sweep.auto import auto_sweep
from fastkd.sweep.auto_result import AutoReport, auto_text
from fastkd.sweep.halving import cost_of, going_on, plan_rungs, ranked
from fastkd.train.evaluations import read
from fastkd.train.metrics import read_metrics
from fastkd.train.trainer import Trainer
from fastkd.utils.intervals import TAIL
from fastkd.utils.signals import Stop

STUDENT = "train_cases:tiny"
CHANGES: dict[str, Any] = SMALL | {"steps": 8, "rate": 0.1, "threads": 1, "evaluate_every": None}
ARMS = {"alpha": [0, 0.2]}  # with the default and hard labels alone four
NAMES = ("alpha=0", "alpha=0.2", "alpha=0.5", "alpha=1")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("auto") / "cache", documents(120), held_out=0.3)


@pytest.fixture(scope="module")
def done(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AutoReport]:
    out = tmp_path_factory.mktemp("auto") / "out"
    return out, choose(cache, out)


def choose(cache: Any, out: Path, arms: Any = ARMS, **changes: Any) -> AutoReport:
    return auto_sweep(STUDENT, cache, out, arms, **{**CHANGES, **changes})


# Which arms go on


def test_rungs() -> None:
    assert [(r.step, r.arms) for r in plan_rungs(16, 320)] == [(20, 16), (40, 8), (80, 4), (160, 2), (320, 1)]
    assert cost_of(plan_rungs(16, 320)) == 3.0
    assert [(r.step, r.arms) for r in plan_rungs(5, 100)] == [(12, 5), (25, 3), (50, 2), (100, 1)]
    grouped = plan_rungs(16, 320, 4)
    assert [(r.step, r.arms) for r in grouped] == [(20, 16), (40, 8), (80, 4), (160, 4), (320, 1)]
    assert cost_of(grouped) == 3.5
    assert [r.arms for r in plan_rungs(3, 100, 5)] == [3, 3, 1]
    for arms in range(2, 28):
        rungs = plan_rungs(arms, 1000)
        assert (rungs[-1].step, rungs[-1].arms, rungs[-2].step) == (1000, 1, 500)
        assert cost_of(rungs) < 3.6
        steps = [rung.step for rung in plan_rungs(arms, 32)]
        assert steps == sorted(set(steps))
    with pytest.raises(TrainError, match="auto: got 15 steps; expected at least 16 for 16 arms"):
        plan_rungs(16, 15)


def test_which_arms_go_on() -> None:
    values = {"a": 1.0, "b": 0.5, "hard": 2.0, "c": float("nan"), "d": 0.5}
    assert ranked(values, 1) == ["b", "d", "a", "hard", "c"]
    assert ranked(values, -1) == ["hard", "a", "b", "d", "c"]
    groups = {"a": 1.0, "b": 1.0, "d": 2.0, "hard": "hard"}
    assert going_on(["b", "a", "d", "hard"], 3, groups) == ["b", "d", "hard"]
    assert going_on(["a", "b", "hard", "d"], 3, groups) == ["a", "hard", "d"]
    assert going_on(["b", "a", "hard", "d"], 2, groups) == ["b", "a"]  # no place for one of each
    assert going_on(["d", "hard", "b"], 1, groups) == ["d"]
    assert going_on(["b", "a", "d"], 2, groups) == ["b", "d"]  # the hard labels diverged


def test_the_arms(cache: Cache, tmp_path: Path) -> None:
    found, default, hard, notes = auto_arms({}, TrainSettings(), cache.spec)
    assert len(found) == len(AUTO) + 1 == 16
    assert not notes
    assert (default.name, hard.name) == (
        "alpha=0.5,temperature=1,divergence=forward_kl", "alpha=1,temperature=1,divergence=forward_kl",
    )  # fmt: skip
    # other settings as they are; and a cache that lacks a temperature
    found, default, *_ = auto_arms({}, TrainSettings(alpha=0.3, temperature=1.5), cache.spec)
    assert len(found) == 17
    assert default.name == "alpha=0.3,temperature=1.5,divergence=forward_kl"
    few = make_cache(tmp_path / "few", temperatures=(1.0, 2.0))
    found, *_, notes = auto_arms({}, TrainSettings(), few.spec)
    assert len(found) == 15
    assert "alpha=0.5,temperature=4,divergence=forward_kl is not possible, and is left out" in notes[0]
    # values of one's own
    found, default, hard, _ = auto_arms({"alpha": [1.0, 0.1], "temperature": []}, TrainSettings(), cache.spec)
    assert [arm.name for arm in found] == ["alpha=1", "alpha=0.1", "alpha=0.5"]
    assert (default.name, hard.name) == ("alpha=0.5", "alpha=1")


# The trainings


def test_the_choice(cache: Cache, done: tuple[Path, AutoReport], tmp_path: Path) -> None:
    out, report = done
    assert report.complete
    assert [(d.step, len(d.values)) for d in report.decisions] == [(2, 4), (4, 2), (8, 1)]
    # an arm is the full training: of the chosen one, to the bit
    assert report.chosen is not None
    run = out / report.chosen / "seed=0"
    changes = report.changes[report.chosen]
    fastkd.train(STUDENT, cache, tmp_path / "plain", **CHANGES | dict(changes) | {"evaluate_every": 2})
    assert bits(run, 8) == bits(tmp_path / "plain", 8)
    assert (run / "student" / "model.safetensors").exists()
    # ranked by what was measured at the rung, and compared with the best
    for decision in report.decisions[:-1]:
        values = [value for _, value, _ in decision.values]
        assert values == sorted(values)
        best = read(out / decision.values[0][0] / "seed=0", decision.step)[0]
        for name, value, behind in decision.values:
            at = read(out / name / "seed=0", decision.step)[0]
            assert value == pytest.approx(at.intervals()["cross_entropy"].mean)
            assert behind == (compare(at, best)["cross_entropy"] if name != decision.values[0][0] else None)
        assert "alpha=1" in decision.kept or len(decision.kept) == 1
    # who fell keeps its evaluations alone, but for the default, which is trained to its end
    for name in NAMES:
        folder = out / name / "seed=0"
        whole = name in (report.chosen, "alpha=0.5")
        assert (folder / "checkpoints").exists() == whole
        assert (json.loads((folder / "run.json").read_text())["report"]["complete"]) == whole


def test_a_card_that_is_missing(cache: Cache, done: tuple[Path, AutoReport], tmp_path: Path) -> None:
    """An arm counts as finished before its card is written."""
    out = tmp_path / "out"
    shutil.copytree(done[0], out)
    card = out / str(done[1].chosen) / "seed=0" / "student" / "README.md"
    text = card.read_text()
    card.unlink()
    choose(cache, out)
    assert card.read_text() == text


def test_the_test_against_the_default(done: tuple[Path, AutoReport]) -> None:
    out, report = done
    assert report.chosen != "alpha=0.5"
    ours, theirs = (
        Evaluation.from_json(json.loads((out / name / "seed=0" / "evaluation.json").read_text()))
        for name in (str(report.chosen), "alpha=0.5")
    )
    assert report.test is not None
    # the chosen one is the best of four: an interval for three comparisons
    assert report.test.difference["cross_entropy"] == compare(ours, theirs, tail=TAIL / 3)["cross_entropy"]
    assert "95% for all 3 comparisons together" in report.why
    reached = max(d.step for d in report.decisions if any(n == "alpha=0.5" for n, *_ in d.values))
    assert report.cost == (pytest.approx((4 * 2 + 2 * 2 + 4) / 8), 1 - reached / 8)


def test_what_it_writes(cache: Cache, done: tuple[Path, AutoReport]) -> None:
    out, report = done
    document, chosen = (json.loads((out / name).read_text()) for name in ("sweep.json", "chosen.json"))
    assert document["chosen"] == chosen["chosen"] == report.chosen
    assert [rung["step"] for rung in document["rungs"]] == [2, 4, 8]
    assert document["verdict"] == chosen["why"] == report.why
    text = auto_text(report)
    assert report.why in text
    assert all(name in text for name in NAMES)
    assert (out / "auto.png").read_bytes().startswith(b"\x89PNG")
    # the command makes the settings that were chosen
    command = parse(chosen["command"][1:])
    assert isinstance(command, Train)
    given = {name: getattr(command, name) for name in chosen["settings"]}
    assert json.loads(json.dumps(given)) == chosen["settings"]
    assert (command.student, command.cache) == (STUDENT, (cache.store.describe(),))
    assert command.alpha == dict(report.changes[str(report.chosen)])["alpha"]


def left(out: Path) -> dict[str, Any]:
    """What a sweep came to, to the bit, but for times and places."""
    found: dict[str, Any] = {}
    for name in ("auto.json", "sweep.json", "chosen.json", "auto.png"):
        found[name] = (out / name).read_bytes()
    for run in sorted(out.glob("*/seed=*")):
        name = run.parent.name
        times = ("seconds", "waiting", "positions_per_second")
        found[f"{name}/log"] = [{k: v for k, v in e.items() if k not in times} for e in read_metrics(run)]
        found |= {f"{name}/{p.name}": p.read_bytes() for p in sorted((run / "evaluations").iterdir())}
        found[f"{name}/files"] = sorted(str(p.relative_to(run)) for p in run.rglob("*") if not p.name.startswith("__"))
        if (run / "checkpoints").exists():
            found |= {f"{name}/{key}": value for key, value in bits(run, 8).items()}
    return found


def die_at(cache: Cache, out: Path, moment: int) -> bool:
    """Die before a step, a checkpoint or the removal of one; and go on. Returns whether it came to that."""
    moments = Moments(moment)
    with pytest.MonkeyPatch.context() as patch, suppress(Killed):
        moments.watch([(Trainer, name) for name in ("_make", "_save", "write_run")], patch)
        moments.watch([(fastkd.sweep.auto, name) for name in ("remove_folder", "write_json")], patch)
        choose(cache, out)
    if not moments.reached:
        return False
    choose(cache, out)
    return True


@pytest.mark.parametrize("moments", [(20,), pytest.param(range(1, 1000), marks=pytest.mark.soak)])
def test_killed(cache: Cache, done: tuple[Path, AutoReport], tmp_path: Path, moments: Sequence[int]) -> None:
    wanted = left(done[0])
    for moment in moments:
        out = tmp_path / str(moment)
        if not die_at(cache, out, moment):
            break
        assert left(out) == wanted, f"killed at moment {moment}"
        shutil.rmtree(out)
    assert moment >= 20


def test_stopped_it_goes_on(cache: Cache, tmp_path: Path) -> None:
    stop = Stop()
    stop()
    report = choose(cache, tmp_path / "out", stop=stop)
    assert (report.status, report.chosen, report.decisions) == (75, None, [])
    assert auto_text(report).endswith("stopped. Run the same command again to resume.")
    with pytest.raises(TrainError, match=r"auto.json: it was begun with other settings \(weight_decay: 0.1 there, 0.2"):
        choose(cache, tmp_path / "out", weight_decay=0.2)
    with pytest.raises(TrainError, match=r"begun with other settings \(arms: "):
        choose(cache, tmp_path / "out", {"alpha": [0, 0.3]})


def test_an_arm_that_diverges_falls(cache: Cache, tmp_path: Path) -> None:
    report = choose(cache, tmp_path / "out", {"rate": [1e30]}, steps=4)
    first = report.decisions[0]
    assert first.values[-1] == ("rate=1e+30", None, None)
    assert "diverged" in auto_text(report)
    assert report.chosen in ("rate=0.1", "alpha=1,rate=0.1")
    assert choose(cache, tmp_path / "out", {"rate": [1e30]}, steps=4).seconds == 0.0


def test_the_command(cache: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["sweep", "--auto", "--student", STUDENT, "--cache", cache.store.describe(), "--out", str(tmp_path / "out")]
    given += ["--device", "cpu", "--rate", "0.1", "--json"]
    assert main([*given, "--steps", "1", "--alpha", "0"]) == 1
    assert "auto: got 1 steps; expected at least 4 for 3 arms" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate_every": 0}, "auto: got no evaluations; expected those of the held-out split"),
        ({"steps": 3}, "auto: got 3 steps; expected at least 4 for 4 arms"),
        ({"best": "mine"}, "best: got 'mine'; expected one of"),
        (
            {"temperature": 0.5, "arms": ()},
            "auto: the settings as they are, which are among the arms, are not possible: temp",
        ),
        ({"arms": {"alpha": [2.0]}}, "arms: alpha: got 2.0"),
    ],
)
def test_what_cannot_be(cache: Cache, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        choose(cache, tmp_path / "out", **changes)


def test_what_it_does_not_take(cache: Cache, tmp_path: Path) -> None:
    none = make_cache(tmp_path / "none", held_out=0.0)
    with pytest.raises(TrainError, match="auto: got no evaluations; expected those of the held-out split"):
        choose(open_cache(tmp_path / "none"), tmp_path / "out")
    assert none.shards
    with pytest.raises((TrainError, StreamError), match="cache: got"):
        choose(object, tmp_path / "out")
    fastkd.sweep(STUDENT, cache, tmp_path / "other", {"alpha": [0]}, seeds=1, **CHANGES | {"evaluate_every": 8})
    with pytest.raises(TrainError, match="it was trained without rungs"):
        choose(cache, tmp_path / "other")
