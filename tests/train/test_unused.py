"""Settings without effect are refused: every one of them, in every mode."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from train_cases import Tiny, documents, make_cache

import fastkd
from fastkd.cli.main import main
from fastkd.errors import TrainError
from fastkd.settings import FeatureSettings, LiveSettings, MutualSettings, RolloutSettings, TargetSettings
from fastkd.train.unused import OF_TEACHER, check_live, check_mutual, check_rollouts_used

LIVE = {field.name for field in fields(LiveSettings)}
FEATURES = {field.name for field in fields(FeatureSettings)}
TARGETS = {field.name for field in fields(TargetSettings)} - {"k", "draws"}
OF_THEIR_TEACHER = {"teacher_k", "teacher_draws"}


def refused(settings: Any, check: Any, **mode: bool) -> set[str]:
    """The settings that are refused, each changed alone."""
    check(settings, **mode)  # the defaults never are
    found = set()
    for field in fields(settings):
        try:
            check(replace(settings, **{field.name: 0.625}), **mode)
        except TrainError as error:
            assert str(error).startswith(f"{field.name}: got 0.625 ")
            found.add(field.name)
    return found


def test_every_setting_in_every_mode() -> None:
    live, online = LiveSettings(), MutualSettings()
    assert refused(live, check_live, cached=True, teacher=False) == LIVE
    assert refused(live, check_live, cached=True, teacher=True, rollouts=True) == LIVE - OF_TEACHER
    assert refused(live, check_live, cached=True, teacher=False, rollouts=True) == LIVE  # others score
    assert refused(live, check_live, cached=False, teacher=True) == set()
    assert refused(live, check_live, cached=False, teacher=False) == OF_TEACHER
    rollouts = {field.name for field in fields(RolloutSettings)} - {"rollouts"}
    assert {*rollouts} == {
        field.name for field in fields(RolloutSettings)
        if field.name != "rollouts" and refused_rollouts(**{field.name: 0.625})
    }  # fmt: skip
    assert not refused_rollouts(rollouts=0.5, rollout_tokens=3)
    some = replace(online, k=9)
    assert refused(some, check_mutual, cached=True, teacher=False) == LIVE - {"k", "draws"} | OF_THEIR_TEACHER
    assert refused(some, check_mutual, cached=False, teacher=True) == FEATURES
    own = FEATURES | TARGETS | OF_TEACHER | OF_THEIR_TEACHER
    assert refused(online, check_mutual, cached=False, teacher=False) == own


def refused_rollouts(**changes: Any) -> bool:
    try:
        check_rollouts_used(RolloutSettings(**changes))
    except TrainError:
        return True
    return False


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cache": "nowhere", "live": LiveSettings(context=16)}, "context: got 16 with a cache"),
        ({"data": documents(), "alpha": 1.0, "live": LiveSettings(teacher_dtype="bfloat16")}, "teacher_dtype: got"),
        ({"cache": "nowhere", "rollouts": RolloutSettings(rollout_tokens=3)}, "rollout_tokens: got 3 without"),
        ({"data": documents(), "alpha": 1.0, "teacher": "ema:0.9"}, "teacher: got 'ema:0.9', and alpha=1"),
    ],
)
def test_a_training_refuses_them(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = {**given, **({"cache": make_cache(tmp_path / "cache")} if "cache" in given else {})}
    with pytest.raises(TrainError, match=message):
        fastkd.train(Tiny(), out=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_students_refuse_them(tmp_path: Path) -> None:
    models = {"a": Tiny(seed=1), "b": Tiny(seed=2)}
    with pytest.raises(TrainError, match=r"mass: got 0\.5 without a teacher that is not trained"):
        fastkd.mutual(models, out=tmp_path / "run", data=documents(), mass=0.5)


def test_one_student_has_nobody_to_learn_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--student", "train_cases:tiny", "--data", "train_cases:documents", "--out", str(tmp_path / "run")]
    assert main(["mutual", *given]) == 1
    assert "--student: got train_cases:tiny; expected two or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--rollout-tokens", "4"], "--rollout-tokens: got 4 without rollouts"),
        (["--teacher-revision", "main"], "--teacher-revision: got 'main' without a teacher that is not trained"),
    ],
)
def test_a_trained_teacher_refuses_them(
    more: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--student", "train_cases:tiny", "--teacher", "train_cases:double", "--data", "train_cases:documents"]
    assert main(["train", *given, "--out", str(tmp_path / "run"), "--train-teacher", *more]) == 1
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
