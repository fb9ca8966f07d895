"""The digits task: a classifier of handwritten digits is trained and captured with its last feature maps, and a student
a tenth of its size is trained from the cache: with those maps, without them, and on labels alone; then beside the
teacher, without a cache, and with a second student in place of a teacher.

OUT/digits/  teacher.safetensors  cache/  student/ (with without_features/ and control/)  report.html  report.json
             live/ live-cache/ pair/ (see digits_live.py)  onnx-int8/ deploy.html deploy.json (see deployed.py)
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .. import __version__
from ..cache import open_cache
from ..capture.api import capture
from ..data.examples import Examples
from ..errors import DataError
from ..evaluate.measures import CLASSIFIER_DEMO, printed_in
from ..models.module import parameters_and_bytes
from ..models.trained import load_trained
from ..report.make import make_report
from ..report.runs import Run, read_runs
from ..settings import DemoSettings, LiveSettings
from ..train.api import train
from ..train.arms import WITHOUT_FEATURES
from ..train.result import RUN, STUDENT
from ..utils import atomic
from ..utils.intervals import Interval
from ..utils.progress import mode_for
from ..utils.signals import Stop, Stopped
from . import DemoResult
from .artifacts import write_json
from .deployed import check_installed, deploy_student, deployed_section, deployed_text
from .digits_inputs import CLASSES, HELD_OUT, Net, digits, new_net, train_teacher
from .digits_live import FIRST, SECOND, train_live
from .results import paired, scores_of, scores_table
from .stages import Stages, verify_before_training

MEASURES = printed_in(CLASSIFIER_DEMO)
FEATURE = "layers.6"  # what the last layer before the classifier returns, of teacher and student
# settings of the student; the control has alpha = 1
TRAINING: dict[str, Any] = {"alpha": 0.1, "temperature": 2.0, "rate": 2e-2, "weight_decay": 0.01, "batch_size": 32}
PAIR: dict[str, Any] = {"alpha": 0.5, "temperature": 1.0}  # a peer knows less than a teacher
MATCH = (f"{FEATURE}:{FEATURE}:sp:2000",)  # which digits of a batch are alike


@dataclass(frozen=True)
class Sizes:
    """images: of the 1797. copies: augmented copies of each. widths: of the networks. epochs: passes over the images
    (teacher), or over the cache (student)."""

    images: int = 1797
    copies: int = 8
    teacher_width: int = 32
    teacher_epochs: int = 30
    student_width: int = 8
    epochs: int = 10


def run(settings: DemoSettings, stop: Stop | None = None, *, sizes: Sizes | None = None) -> DemoResult:
    """Run the task, reusing earlier results, and write report.html and report.json.

    Raises DataError for settings that this task does not have, or if scikit-learn is not installed; CacheError if the
    folder has a cache of other settings or a damaged one; `Stopped` if `stop` was called.
    """
    for field in fields(DemoSettings):
        if field.name not in ("task", "out", "seed") and (value := getattr(settings, field.name)) != field.default:
            raise DataError(f"{field.name}: got {value!r}, but the task digits has no such setting. Leave it out.")
    check_installed()
    sizes, stages, out, seed = sizes or Sizes(), Stages(), settings.out / "digits", settings.seed
    with stages.stage("digits", "from scikit-learn, rotated and shifted at random"):
        data = digits(seed, images=sizes.images, copies=sizes.copies)
    with stages.stage("teacher", f"a network of width {sizes.teacher_width}, trained on labels"):
        teacher, trained = load_or_train_teacher(out / "teacher.safetensors", data, sizes, seed, stages)
    teacher_size = dict(zip(("parameters", "bytes"), parameters_and_bytes(teacher), strict=True))
    with stages.stage("capture", f"{len(data) * data.copies:,} augmented digits into {out / 'cache'}"):
        captured = capture(
            teacher, data, out / "cache", vocab_size=CLASSES, k=CLASSES, draws=0, held_out=HELD_OUT, seed=seed,
            shard_positions=1024, batch_tokens=1024, features=(FEATURE,), stop=stop, progress=mode_for(),
        )  # fmt: skip
        if not captured.complete:
            raise Stopped
        if not captured.positions_captured:
            stages.log("capture: the cache is complete, the teacher did not run")
    checked = verify_before_training(out / "cache", stages)
    with stages.stage("train", "a student from the cache with features, then without them, then on labels alone"):
        done = train(
            # another seed than the teacher's: equal initial weights alone could make them similar
            partial(new_net, sizes.student_width, seed + 1), out / "cache", out / "student", data=data, control=True,
            stop=stop, progress=mode_for(), epochs=float(sizes.epochs), seed=seed, match=MATCH, **TRAINING,
        )  # fmt: skip
        if not done.complete:
            raise Stopped
        if all(one.resumed == one.steps for one in (done, *done.arms.values())):
            stages.log("train: the students are reused")
        document = json.loads((out / "student" / RUN).read_text())
        atomic.write_json(out / "student" / RUN, document | {"teacher": teacher_size})
    with stages.stage("live", "the student without features beside the teacher; two students that teach each other"):
        students = {FIRST: partial(new_net, sizes.student_width, seed + 1),
                    SECOND: partial(new_net, sizes.student_width, seed + 2)}  # fmt: skip
        how = LiveSettings(k=CLASSES, draws=0, held_out=HELD_OUT, data_seed=seed, shard_positions=1024,
                           teacher_batch_tokens=1024)  # fmt: skip
        live = train_live(
            teacher, data, out, students, how, PAIR, stop=stop, epochs=float(sizes.epochs), seed=seed, **TRAINING
        )
    student = load_trained(new_net(sizes.student_width, seed + 1), out / "student" / STUDENT, DataError)
    deployed = deploy_student(student, out / "cache", out, stages, data=data)
    with stages.stage("report", str(out / "report.html")):
        folders = [out / "student", out / "live", out / "pair"]
        make_report(folders, out / "report.html", more=[deployed_section(deployed)])
    runs = read_runs([out / "student"])
    evaluation = runs[0].evaluation
    assert evaluation is not None
    differences = {name: _to_json(found) for name, found in paired(runs).items()}
    report = {
        "fastkd": __version__,
        "settings": {"task": "digits", "out": str(settings.out), "seed": seed, "match": MATCH}
        | asdict(sizes)
        | TRAINING,
        "teacher": teacher_size,
        "trained_now": trained,
        "captured_now": captured.positions_captured,
        "positions": checked.positions,
        "bytes": checked.bytes,
        "feature_bytes": sum(open_cache(out / "cache").features[FEATURE].manifest.column("bytes").to_pylist()),
        "seconds": stages.seconds,
        "student": {name: runs[0].part("student", name) for name in ("parameters", "bytes")},
        "held_out": evaluation.windows,
        "waiting": runs[0].part("report", "waiting"),
        "scores": {name: _to_json(found) for name, found in scores_of(runs).items()},
        "student_minus_control": differences["student - control"],
        "student_minus_without_features": differences["student - without features"],
        "live_is_the_cached_student": live.same,
        "pair": {name: _to_json(found) for name, found in live.pair.items()},
        "pair_first_minus_control": _to_json(live.minus_control),
        "deployed": deployed,
        "features": done.verdicts[WITHOUT_FEATURES].overall if WITHOUT_FEATURES in done.verdicts else None,
    }
    write_json(out / "report.json", report)
    return DemoResult(report, text_of(report, runs))


def load_or_train_teacher(path: Path, data: Examples, sizes: Sizes, seed: int, stages: Stages) -> tuple[Net, bool]:
    """The teacher in a file, if it has the same settings and data, or else a new one; and whether it is new."""
    inputs = json.dumps({"seed": seed, "width": sizes.teacher_width, "epochs": sizes.teacher_epochs,
                         "data": data.fingerprint(), "labels": data.labels_fingerprint()})  # fmt: skip
    teacher = new_net(sizes.teacher_width, seed)
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("made") == inputs:
                teacher.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
                stages.log(f"teacher: {path} is reused")
                return teacher.eval(), False
        stages.log(f"teacher: {path} has other settings")
    except (FileNotFoundError, SafetensorError) as error:
        if path.exists():
            stages.log(f"teacher: {path} cannot be read ({error})")
    teacher = train_teacher(sizes.teacher_width, data, seed, epochs=sizes.teacher_epochs, progress=mode_for())
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_file(path, lambda temporary: save_file(teacher.state_dict(), temporary, metadata={"made": inputs}))
    return teacher, True


def _to_json(found: Mapping[str, Interval]) -> dict[str, dict[str, float]]:
    return {measure.name: found[measure.name]._asdict() for measure in MEASURES if measure.name in found}


def _figure(value: Mapping[str, float], sign: str = "") -> str:
    return f"{value['mean']:{sign}.3f} ± {value['half']:.3f}"


def text_of(report: dict[str, Any], runs: Sequence[Run]) -> str:
    """The report as text."""
    positions, now = report["positions"], report["captured_now"]
    teacher, student = (report[name]["parameters"] for name in ("teacher", "student"))
    return "\n".join([
        f"{positions:,} augmented digits cached, {report['bytes'] / positions:.1f} bytes each, and "
        f"{report['feature_bytes'] / positions:.0f} of feature maps; "
        + (f"the teacher ran on {now:,}" if now else "the teacher did not run"),
        f"teacher: {teacher:,} parameters; student: {student:,}, {student / teacher:.1%} of them",
        "",
        *scores_table(runs, MEASURES, "held-out digits"),
        f"  each digit in {report['settings']['copies']} augmented copies, the same pixels for teacher and students",
        "  ±: 95% interval, with digits as the units; differences are paired",
        f"  student: it also matches the teacher's feature maps ({', '.join(report['settings']['match'])})",
        "  without features: the same student on the teacher's answers alone, in the same order",
        "  control: the same student on labels alone, in the same order; KL to the cached targets",
        f"  the features by cross-entropy: {report['features']}",
        "",
        "live: without features, beside the teacher and without a cache, the student has "
        + ("the same weights, bit for bit" if report["live_is_the_cached_student"] else "OTHER WEIGHTS"),
        "pair: two students that teach each other, without a teacher, have a cross-entropy of "
        + " and ".join(_figure(found["cross_entropy"]) for found in report["pair"].values())
        + f"; the first minus the control: {_figure(report['pair_first_minus_control']['cross_entropy'], '+')}",
        "",
        deployed_text(report["deployed"]),
        "",
        f"{report['settings']['out']}/digits/report.html shows the runs.",
    ])  # fmt: skip
