"""Settings as keyword arguments: the TypedDicts have the fields of the dataclasses, and a wrong name is noticed."""

import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import fastkd
from fastkd import settings_changes as changes
from fastkd.capture.session import CaptureSession
from fastkd.deploy.api import deploy_report, export
from fastkd.generations.api import generations
from fastkd.integrations.hf.attach import LOSS_SETTINGS, attach
from fastkd.integrations.hf.mixin import DistillMixin
from fastkd.integrations.ray import capture_driver, training, tuning
from fastkd.kernels import LossConfig
from fastkd.kernels.loss.config import LossSettings
from fastkd.live.source import LiveSource
from fastkd.settings import (
    CaptureSettings,
    DeploySettings,
    ExportSettings,
    LiveSettings,
    MutualSettings,
    TrainSettings,
)
from fastkd.stream.shard_source import SourceChanges, SourceOptions
from fastkd.sweep.api import sweep
from fastkd.sweep.auto import auto_sweep
from fastkd.train.mutual import mutual
from fastkd.train.own_loop import distill_module

PAIRS: list[tuple[Any, type]] = [
    (changes.CaptureChanges, CaptureSettings),
    (changes.DeployChanges, DeploySettings),
    (changes.ExportChanges, ExportSettings),
    (changes.LiveChanges, LiveSettings),
    (changes.MutualChanges, MutualSettings),
    (changes.TrainChanges, TrainSettings),
    (SourceChanges, SourceOptions),
]


@pytest.mark.parametrize(("named", "settings"), PAIRS, ids=lambda one: one.__name__)
def test_names_and_types_are_those_of_the_settings(named: Any, settings: type) -> None:
    """Whoever adds a setting adds it to fastkd/settings_changes.py, too."""
    assert get_type_hints(named) == {f.name: get_type_hints(settings)[f.name] for f in fields(settings)}
    assert not named.__required_keys__


def test_the_loss_and_both_settings_of_mutual() -> None:
    assert get_type_hints(LossSettings).keys() == {field.name for field in fields(LossConfig)}
    both = get_type_hints(MutualSettings) | get_type_hints(TrainSettings)
    assert get_type_hints(changes.MutualTrainChanges) == both
    assert get_type_hints(changes.AttachChanges).keys() == LOSS_SETTINGS


@pytest.mark.parametrize(
    "function",
    [
        fastkd.capture, CaptureSession.__init__, fastkd.train, sweep, auto_sweep, mutual, generations, export,
        deploy_report, distill_module, attach, LiveSource.__init__, DistillMixin.__init__, capture_driver.capture,
        training.train, tuning.sweep,
    ],
    ids=lambda one: one.__qualname__ if inspect.isfunction(one) else one.__name__,
)  # fmt: skip
def test_public_functions_take_no_names_that_nobody_knows(function: Any) -> None:
    (last,) = [one for one in inspect.signature(function).parameters.values() if one.kind is one.VAR_KEYWORD]
    (named,) = get_args(last.annotation)
    assert named.__annotations__
    others = inspect.signature(function).parameters.keys() - {last.name}
    assert not others & get_type_hints(named).keys()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(capture_driver.capture, fastkd.capture), (training.train, fastkd.train), (tuning.sweep, sweep)],
)
def test_a_cluster_takes_what_a_process_does(ours: Any, theirs: Any) -> None:
    def names(function: Any) -> set[str]:
        parameters = inspect.signature(function).parameters
        (last,) = [name for name, one in parameters.items() if one.kind is one.VAR_KEYWORD]
        return (parameters.keys() - {last}) | get_type_hints(get_args(parameters[last].annotation)[0]).keys()

    decided = {"shards", "rank", "world_size", "group", "run"}  # by the driver
    assert names(theirs) - decided <= names(ours)
    assert names(ours) - names(theirs) <= {"workers", "gpus_per_worker", "cpus_per_worker", "failures", "asha"}


def test_a_wrong_name_is_answered_with_the_right_one(tmp_path: Path) -> None:
    wrong: Any = {"raet": 1.0, "stepz": 3}
    with pytest.raises(TypeError, match=r"train\(\) got unexpected settings: raet, stepz. .*mean rate\?.*mean steps"):
        fastkd.train("s", "c", tmp_path / "o", **wrong)
    with pytest.raises(TypeError, match=r"mutual\(\) got unexpected settings: evry. Did you mean every"):
        mutual(["a", "b"], None, tmp_path / "o", evry=1)  # type: ignore[call-arg]
    assert not list(tmp_path.iterdir())


_CALLS = """
import fastkd

from fastkd.integrations.hf.mixin import DistillMixin
from fastkd.integrations.ray import capture_driver, training

def right() -> None:
    fastkd.train("s", "c", "o", rate=1e-3, match=("auto",), clip=None)
    fastkd.capture("t", "d", "o", k=64, packing="keep")
    DistillMixin("m", cache="c", alpha=0.5, callbacks=[])
    training.train("s", "c", "o", rate=1e-3, control=True)

def wrong() -> None:
    fastkd.train("s", "c", "o", raet=1e-3)
    fastkd.train("s", "c", "o", steps="ten")
    fastkd.capture("t", "d", "o", kk=64)
    DistillMixin("m", cache="c", alhpa=0.5)
    training.train("s", "c", "o", contrl=True)
    capture_driver.capture("t", "d", "o", kk=64)
"""


@pytest.mark.soak
def test_a_wrong_name_is_an_error_of_mypy(tmp_path: Path) -> None:
    """Of the package as it is here; the whole of it is read, which takes minutes."""
    pytest.importorskip("mypy")
    (tmp_path / "calls.py").write_text(_CALLS)
    where = str(Path(fastkd.__file__).parents[1])
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports=silent", "--ignore-missing-imports", "calls.py"],
        cwd=tmp_path, env={"MYPYPATH": where, "PATH": ""}, capture_output=True, text=True,
    )  # fmt: skip
    lines = [line for line in found.stdout.splitlines() if line.startswith("calls.py") and ": error:" in line]
    assert [int(line.split(":")[1]) for line in lines] == list(range(14, 20)), found.stdout
