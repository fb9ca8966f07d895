"""A run that is complete already: the same call again answers from run.json, and loads and computes nothing."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from ..settings import TrainSettings
from ..utils.atomic import read_sealed
from ..utils.intervals import Interval
from ..utils.secrets import masked
from .arms import CONTROL
from .given import given_files, given_name
from .held_out import EVALUATION
from .inputs import CacheInputs
from .result import RUN, STUDENT, TrainReport
from .verdict import Verdict

DEFAULTS = TrainSettings()


def finished_report(
    out: Path, student: Any, settings: TrainSettings, inputs: Any, *, control: bool
) -> TrainReport | None:
    """The report of a training that is complete in a folder, if it is the one that is wanted: of a student named by a
    text, whose files have not changed, on the loss of the settings, with equal settings, from the same cache of text;
    with its control, if that is wanted; and all that it exported is there. Otherwise None: the training then resumes,
    and what differs is judged as it always is."""
    if not isinstance(student, (str, Path)) or not isinstance(inputs, CacheInputs):
        return None
    if len(inputs.caches) != 1 or inputs.data is not None or (run := _read(out / RUN)) is None:
        return None
    if any(name in run for name in ("objective", "inner_teacher", "rollouts", "live")):
        return None
    wanted = {"settings": _answered(asdict(settings)), "caches": inputs.describe()["caches"]}
    if not isinstance(own := run.get("settings"), dict):
        return None
    there = run | {"settings": _answered(asdict(DEFAULTS) | own)}
    if any(there.get(name) != json.loads(json.dumps(masked(value))) for name, value in wanted.items()):
        return None
    try:
        began = run["student"]
        if began.get("given") != masked(given_name(student)) or began.get("given_files") != given_files(student):
            return None
        if "base_sha256" in began:  # that of the base is compared when it is loaded
            return None
        report = _report(run["report"], out)
    except (KeyError, TypeError, ValueError):  # of another version
        return None
    if not _all_there(out, report):
        return None
    if not control:
        return replace(report, control=None, verdicts={})
    return report if report.control is not None and _all_there(out / CONTROL, report.control) else None


def _answered(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without those that change no answer. Older runs have not all of those of today, or say 2 for what
    is now the default of `keep`."""
    found: dict[str, Any] = json.loads(json.dumps(settings))
    del found["keep"]
    return found


def _all_there(out: Path, report: TrainReport) -> bool:
    """Whether the files of a result are: its models, and its evaluation."""
    folders = [out / STUDENT, *map(Path, report.exported.values())]
    models = all(next(folder.glob("*.safetensors"), None) for folder in folders)
    return report.complete and models and (not report.evaluation or (out / EVALUATION).exists())


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = read_sealed(path)
    except (OSError, ValueError):
        return None
    return found


def _report(found: Mapping[str, Any], out: Path) -> TrainReport:
    """The report in run.json, as a call returns it that had nothing to do."""
    if "stopped_worse" in found or "without_features" in found or not found["complete"]:
        raise ValueError("it is not complete, or not of a training on the loss alone")
    plain = {f.name: found[f.name] for f in fields(TrainReport) if f.name in found}
    plain |= {"out": str(out), "resumed": found["step"], "positions": 0, "seconds": 0.0, "waiting": 0.0}
    plain["student"] = str(out / STUDENT)
    plain["control"] = _report(found["control"], out / CONTROL) if found.get("control") else None
    plain["exported"] = {name: str(out / f"{STUDENT}-{name}") for name in found["exported"]}
    plain["verdicts"] = {name: _verdict(one) for name, one in found.get("verdicts", {}).items()}
    return TrainReport(**plain)


def _verdict(found: Mapping[str, Any]) -> Verdict:
    def intervals(some: Mapping[str, Any]) -> dict[str, Interval]:
        return {
            name: Interval(one["mean"], math.inf if one["high"] is None else one["high"] - one["mean"])
            for name, one in some.items()
        }

    slices = {name: intervals(cells) for name, cells in found["slices"].items()}
    difference, kind = intervals(found["difference"]), found.get("kind", "text")
    return Verdict(found["against"], found["measure"], found["windows"], difference, slices, kind=kind)
