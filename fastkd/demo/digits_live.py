"""Teachers of the digits task that are not a cache: the same teacher beside the student, and two students that teach
each other.

OUT/digits/  live/ (the student, trained beside the teacher)  live-cache/ (what that left)  pair/ (two students)
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ..data.examples import Examples
from ..report.peers import students_of
from ..report.runs import paired_differences, read_run
from ..settings import LiveSettings
from ..train.api import train
from ..train.arms import CONTROL, WITHOUT_FEATURES
from ..train.mutual import mutual
from ..train.result import STUDENT
from ..utils.intervals import Interval
from ..utils.progress import mode_for
from ..utils.signals import Stop, Stopped

FIRST, SECOND = "first", "second"


class LiveResult(NamedTuple):
    """same: whether the student that was trained beside its teacher has the weights of the one from the cache, bit for
    bit. pair: the measures of the two students that taught each other; minus_control: the first one's minus those of
    the control, which began with the same weights."""

    same: bool
    pair: Mapping[str, Mapping[str, Interval]]
    minus_control: Mapping[str, Interval]


def train_live(
    teacher: nn.Module,
    data: Examples,
    out: Path,
    students: Mapping[str, Callable[[], nn.Module]],
    live: LiveSettings,
    pair: Mapping[str, Any],
    *,
    stop: Stop | None = None,
    **training: Any,
) -> LiveResult:
    """Train them, or resume. students: of the names `FIRST`, as in `out/student`, and `SECOND`. live: the settings of
    `out/cache`'s capture. pair: settings of the two students that differ from `training`. Raises `Stopped` if `stop`
    was called."""
    common: dict[str, Any] = {"data": data, "stop": stop, "progress": mode_for(), **training}
    alone = train(
        students[FIRST], out=out / "live", teacher=teacher, live=live, write_cache=out / "live-cache", **common
    )  # fmt: skip
    # a cache for its held-out split alone: they learn from each other, and from labels
    learns = {FIRST: (SECOND,), SECOND: (FIRST,)}
    both = mutual(students, out / "cache", out / "pair", learns=learns, k=live.k, **{**common, **pair})
    if not (alone.complete and both.complete):
        raise Stopped
    weights = [
        (run / STUDENT / "model.safetensors").read_bytes() for run in (out / "live", out / "student" / WITHOUT_FEATURES)
    ]
    runs = {run.name.rpartition(", ")[2]: run for run in students_of(read_run(out / "pair", "pair"), out / "pair")}
    control = read_run(out / "student" / CONTROL, CONTROL)
    return LiveResult(
        weights[0] == weights[1],
        {name: runs[name].measures for name in (FIRST, SECOND)},
        paired_differences(runs[FIRST], control),
    )
