"""The demo of a classifier: handwritten digits, a teacher trained on the spot, and from its cache a student a tenth of
its size, beside its control.

DEMO/digits/  teacher.safetensors  cache/  student/ (a run, with control/)  report.html  report.json
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .. import __version__
from ..capture.api import capture
from ..data.examples import Examples
from ..errors import DataError
from ..evaluate.api import Evaluation, compare
from ..evaluate.measures import CLASSIFIER_DEMO, printed_in
from ..models.module import parameters_and_bytes
from ..report.make import make_report
from ..settings import DemoSettings
from ..train.api import EVALUATION, train
from ..train.result import CONTROL, RUN
from ..utils.atomic import write_file, write_text
from ..utils.intervals import Interval
from ..utils.numbers import with_half
from ..utils.progress import mode_for
from ..utils.signals import Stop, Stopped
from . import Done
from .damage import verified
from .digits_data import CLASSES, HELD_OUT, digits
from .digits_net import Net, net, train_teacher
from .stages import Clock


@dataclass(frozen=True)
class Sizes:
    """images: of the 1797. copies: of each, augmented differently. The rest: widths of the networks, and passes over
    the images, or the cache."""

    images: int = 1797
    copies: int = 8
    teacher_width: int = 32
    teacher_epochs: int = 30
    student_width: int = 8
    epochs: int = 10


@dataclass(frozen=True)
class Training:
    """Of the student; the control's alpha is 1."""

    alpha: float = 0.1
    temperature: float = 2.0
    rate: float = 2e-2
    weight_decay: float = 0.01
    batch_size: int = 32


def run(settings: DemoSettings, stop: Stop | None = None, *, sizes: Sizes | None = None) -> Done:
    """All of it; what is there from before is taken as it is.

    Raises DataError where other settings are given than this task has, or scikit-learn is not installed; CacheError
    where the folder holds another cache, or a damaged one; `Stopped` where a stop was asked for.
    """
    check(settings)
    sizes, clock, out, seed = sizes or Sizes(), Clock(), settings.out / "digits", settings.seed
    with clock.stage("digits", "scikit-learn's, turned and shifted by their seeds"):
        data = digits(seed, images=sizes.images, copies=sizes.copies)
    with clock.stage("teacher", f"a network of width {sizes.teacher_width}, trained on labels"):
        teacher, trained = have_teacher(out / "teacher.safetensors", data, sizes, seed, clock)
    with clock.stage("capture", f"{len(data) * data.copies:,} augmented digits into {out / 'cache'}"):
        captured = have_cache(out / "cache", teacher, data, seed, clock, stop)
    checked = verified(out / "cache", clock)
    with clock.stage("train", "a student from the cache, then its control on labels alone"):
        of_teacher = dict(zip(("parameters", "bytes"), parameters_and_bytes(teacher), strict=True))
        del teacher
        have_student(out / "student", out / "cache", data, sizes, seed, of_teacher, clock, stop)
    with clock.stage("report", str(out / "report.html")):
        make_report([out / "student"], out / "report.html")
    report = {
        "fastkd": __version__,
        "settings": {"task": "digits", "out": str(settings.out), "seed": seed} | asdict(sizes) | asdict(Training()),
        "teacher": of_teacher,
        "trained_now": trained,
        "captured_now": captured,
        "positions": checked.positions,
        "bytes": checked.bytes,
        "seconds": clock.seconds | {"all": clock.total},
        **scores(out / "student"),
    }
    write_text(out / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    return Done(report, text_of(report))


def check(settings: DemoSettings) -> None:
    """DataError where a setting is given that is another task's."""
    for field in fields(DemoSettings):
        if field.name not in ("task", "out", "seed") and (value := getattr(settings, field.name)) != field.default:
            raise DataError(f"{field.name}: got {value!r} with the task digits, which has none. Leave it out.")


def have_teacher(path: Path, data: Examples, sizes: Sizes, seed: int, clock: Clock) -> tuple[Net, bool]:
    """The teacher that is there, if it was made with the same settings, or a new one; and whether it is new."""
    made = json.dumps({"seed": seed, "width": sizes.teacher_width, "epochs": sizes.teacher_epochs,
                       "data": data.fingerprint(), "labels": data.labels_fingerprint()})  # fmt: skip
    teacher = net(sizes.teacher_width, seed)
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("made") == made:
                teacher.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
                clock.say(f"teacher: it is there from before, in {path}")
                return teacher.eval(), False
        clock.say(f"teacher: the one in {path} was made with other settings")
    except FileNotFoundError:
        pass
    except SafetensorError as error:
        clock.say(f"teacher: {path} cannot be read ({error})")
    teacher = train_teacher(sizes.teacher_width, data, seed, epochs=sizes.teacher_epochs, progress=mode_for())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, lambda part: save_file(teacher.state_dict(), part, metadata={"made": made}))
    return teacher, True


def have_cache(place: Path, teacher: Net, data: Examples, seed: int, clock: Clock, stop: Stop | None) -> int:
    """Have the cache whole; how many digits the teacher had to be run on for it."""
    report = capture(
        teacher, data, place, vocab_size=CLASSES, k=CLASSES, draws=0, held_out=HELD_OUT, seed=seed,
        shard_positions=1024, batch_tokens=1024, stop=stop, progress=mode_for(),
    )  # fmt: skip
    if not report.complete:
        raise Stopped
    if not report.positions_captured:
        clock.say("capture: the cache is there from before, the teacher is not run")
    return report.positions_captured


def have_student(
    out: Path, cache: Path, data: Examples, sizes: Sizes, seed: int, teacher: dict[str, int], clock: Clock,
    stop: Stop | None,
) -> None:  # fmt: skip
    """Have the run of the student, its control in it. teacher: what its report says of the teacher."""
    report = train(
        # whoever starts where the teacher started could come to the same by that alone
        lambda: net(sizes.student_width, seed + 1), cache, out, data=data, control=True, stop=stop,
        progress=mode_for(), epochs=float(sizes.epochs), seed=seed, **asdict(Training()),
    )  # fmt: skip
    if not report.complete:
        raise Stopped
    if report.control is not None and report.resumed == report.steps == report.control.resumed:
        clock.say("train: the students are there from before")
    document = json.loads((out / RUN).read_text())
    write_text(out / RUN, json.dumps(document | {"teacher": teacher}, indent=1, allow_nan=False) + "\n")


def scores(run: Path) -> dict[str, Any]:
    """What was measured of each on the digits held out, and how student and control differ."""
    ours, control = (Evaluation.from_json(json.loads((f / EVALUATION).read_text())) for f in (run, run / CONTROL))
    document = json.loads((run / RUN).read_text())
    of_teacher = ours.teacher_intervals()
    # all classes are kept, so its labels are known and the bound is the figure
    of_teacher["cross_entropy"] = of_teacher["cross_entropy_at_least"]
    everyone = {"teacher": of_teacher, "student": ours.intervals(), "control": control.intervals()}
    return {
        "student": {name: document["student"][name] for name in ("parameters", "bytes")},
        "held_out": ours.windows,
        "waiting": document["report"]["waiting"],
        "scores": {name: as_json(measures) for name, measures in everyone.items()},
        "student_minus_control": as_json(compare(ours, control)),
    }


def as_json(measures: Mapping[str, Interval]) -> dict[str, dict[str, float]]:
    """The measures that are shown."""
    return {m.name: measures[m.name]._asdict() for m in printed_in(CLASSIFIER_DEMO) if m.name in measures}


def text_of(report: dict[str, Any]) -> str:
    """The report for a person."""
    settings, positions = report["settings"], report["positions"]
    sizes = [report[name]["parameters"] for name in ("teacher", "student")]
    ran = f"the teacher ran on {report['captured_now']:,}" if report["captured_now"] else "the teacher did not run"
    shown = printed_in(CLASSIFIER_DEMO)
    lines = [
        f"{positions:,} augmented digits cached, {report['bytes'] / positions:.1f} bytes each; {ran}",
        f"teacher: {sizes[0]:,} parameters; student: {sizes[1]:,}, {sizes[1] / sizes[0]:.1%} of them",
        "",
        f"{report['held_out']:>4} held-out digits  " + "".join(f"{measure.short:>20}" for measure in shown),
    ]
    rows = report["scores"] | {"student - control": report["student_minus_control"]}
    for name, measures in rows.items():
        cells = []
        for measure in shown:
            found = measures.get(measure.name)
            if found is None:  # the teacher, of itself
                cells.append("")
                continue
            sign = name not in report["scores"]
            cells.append(" ± ".join(filter(None, with_half(**found, scale=measure.scale, sign=sign))))
        lines.append(f"  {name:<19}" + "".join(f"{cell:>20}" for cell in cells))
    lines += [
        f"  each digit in {settings['copies']} augmented copies, the same pixels for teacher and students",
        "  ±: 95% interval, digits being the units; of the difference in pairs",
        "  control: the same student on labels alone, in the same order; KL against the cached targets",
        "",
        "seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in report["seconds"].items()),
        f"{settings['out']}/digits/report.html shows the runs.",
    ]
    return "\n".join(lines)
