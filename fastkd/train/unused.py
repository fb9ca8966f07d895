"""Settings that have no effect on a training are refused, not ignored."""

from collections.abc import Collection
from dataclasses import fields
from typing import Any

from ..errors import TrainError
from ..settings import FeatureSettings, LiveSettings, MutualSettings, RolloutSettings, ShareSettings, TargetSettings

_OF_MODEL = ("teacher_dtype", "teacher_attention", "teacher_revision", "teacher_options")
OF_TEACHER = {*_OF_MODEL, "teacher_batch_tokens"}
"""How a teacher is loaded and run."""
_OF_STUDENTS = {"k", "draws"}  # what students keep of each other's outputs
_OF_THEIR_TEACHER = {"teacher_k", "teacher_draws"}
_OF_FEATURES = {field.name for field in fields(FeatureSettings)}
_OF_TARGETS = {field.name for field in fields(TargetSettings)} - _OF_STUDENTS


def check_used(given: Any, unused: Collection[str], when: str) -> None:
    """Raise TrainError, naming it, for a setting that is not at its default and has no effect. given: settings. when:
    why, as in "with a cache"."""
    for field in fields(given):
        value = getattr(given, field.name)
        if field.name in unused and value != field.default:
            raise TrainError(f"{field.name}: got {value!r} {when}; expected the default, as it has no effect.")


def check_live(live: LiveSettings, *, cached: bool, teacher: bool, rollouts: bool = False) -> None:
    """Raise TrainError for settings of live teachers without effect. cached: the training has a cache. teacher: one
    runs beside the student."""
    if cached:
        loads = OF_TEACHER if rollouts and teacher else set[str]()
        everything = {field.name for field in fields(LiveSettings)}
        check_used(live, everything - loads, "with a cache, which has windows and targets")
    elif not teacher:
        check_used(live, OF_TEACHER, "without a teacher beside the student")


def check_rollouts_used(rollouts: RolloutSettings) -> None:
    """Raise TrainError for settings of rollouts without any."""
    if not rollouts.rollouts:
        check_used(rollouts, {field.name for field in fields(RolloutSettings)} - {"rollouts"}, "without rollouts")


def check_share(share: ShareSettings) -> None:
    """Raise TrainError for settings of an upload without one."""
    if share.push is None:
        check_used(share, {"push_private"}, "without push")


def check_mutual(online: MutualSettings, *, cached: bool, teacher: bool) -> None:
    """Raise TrainError for settings without effect on students that learn from each other. teacher: one that is not
    trained runs beside them."""
    check_used(online, _OF_FEATURES, "for students that learn from each other, which match no features")
    if cached:
        unused = {field.name for field in fields(LiveSettings)} - _OF_STUDENTS | _OF_THEIR_TEACHER
        check_used(online, unused, "with a cache, which has windows and targets")
    elif not teacher:
        check_used(online, OF_TEACHER | _OF_TARGETS | _OF_THEIR_TEACHER, "without a teacher that is not trained")
