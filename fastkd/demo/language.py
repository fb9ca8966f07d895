"""The demo: a teacher captured once into a cache, and from the cache a student healed beside its control."""

import json
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from .. import __version__
from ..cache import Cache, CacheError, open_cache, verify_cache
from ..healing import Arrays, CausalModel, Scores, evaluate, heal, kept_layers, paired
from ..intervals import interval
from ..progress import mode_for
from ..settings import DemoSettings
from ..teacher.capture import capture
from ..teacher.protocol import Head, Hidden
from . import Done, smollm2

Array = NDArray[Any]
Report = dict[str, Any]
AGAIN = "Delete bad shards and manifest.parquet, and run it again: it captures what is missing, and nothing else."


class Teacher(Protocol):
    """Where the teacher comes from. `model` reads it anew each time: the student starts as another copy."""

    @property
    def name(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    def tokens(self, text: str) -> Array: ...
    def model(self) -> CausalModel: ...


class Clock:
    """Seconds by stage, each said when it begins."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, what: str) -> Iterator[None]:
        self.say(f"{name}: {what}")
        begun = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.begun:4.0f} s] {text}", file=sys.stderr, flush=True)


def demo_text() -> str:
    """CPython's language reference, which every CPython carries; of its paragraphs that stand in several topics, one.

    A fifth of it is repetition: held-out windows would otherwise have been trained on.
    """
    from pydoc_data.topics import topics

    paragraphs = (p for topic in topics.values() for p in topic.split("\n\n"))
    return "\n\n".join({" ".join(p.split()): p.strip("\n") for p in paragraphs if p.strip()}.values())


def chosen_windows(ids: Array, settings: DemoSettings) -> Array:
    """As many of the text's windows as are asked for, `[windows, L]`; CacheError where it has fewer."""
    train, held_out, length = settings.train_windows, settings.held_out, settings.window
    count = len(ids) // length
    if min(train, held_out) < 1 or train + held_out > count:
        raise CacheError(
            f"windows: found {train} to train on and {held_out} held out of a text of {count}; fewer are needed, and "
            "at least one of each."
        )
    chosen = np.random.default_rng(settings.seed).permutation(count)[: train + held_out]
    return ids[: count * length].reshape(-1, length)[np.sort(chosen)]


def run(settings: DemoSettings) -> Done:
    """The demo with its own teacher and text."""
    clock = Clock()
    with clock.stage("teacher", "SmolLM2-135M-Instruct, converted once"):
        teacher = smollm2.SmolLM2(settings.out / "teacher")
    report = run_demo(settings, teacher, demo_text(), clock)
    return Done(report, text_of(report))


def run_demo(settings: DemoSettings, teacher: Teacher, text: str, clock: Clock) -> Report:
    """All of it, resuming where an earlier run stopped. Writes report.json beside the cache, and returns it.

    Raises CacheError where the folder holds a cache of other settings, or one that is damaged.
    """
    length = settings.window
    with clock.stage("text", "tokens, cut into windows"):
        windows = chosen_windows(teacher.tokens(text), settings)
        order = training_order(settings)
    with clock.stage("capture", f"{windows.size:,} positions into {settings.out / 'cache'}"):
        captured = capture_windows(settings, teacher, windows, clock)
    with clock.stage("verify", "every byte of the cache against its hash"):
        if problems := verify_cache(settings.out / "cache", deep=True).problems:
            raise CacheError(f"{settings.out / 'cache'}: {'; '.join(map(str, problems))}. Nothing was trained. {AGAIN}")
        cache = open_cache(settings.out / "cache")
        spec, arrays = cache.spec, cache.sequences(range(settings.train_windows))
        apart = cache.sequences(range(settings.train_windows, len(windows)))
    with clock.stage("evaluate", "the teacher, for the last time"):
        scores = {"teacher": teacher_scores(settings, teacher, cache, apart, clock)}
    losses: dict[str, list[float]] = {}
    for name, alpha in (("healed", settings.alpha), ("control", 1.0)):
        student = teacher.model()
        student.keep_layers(kept_layers(len(student.layers), settings.cut))
        if not losses:
            with clock.stage("evaluate", "the damaged student"):
                scores["damaged"] = evaluate(student, spec, apart, length=length, title="damaged")
        with clock.stage(f"train {name}", f"{len(order)} steps from the cache, alpha = {alpha:g}"):
            losses[name] = heal(
                student, spec, arrays, length=length, order=order, rate=settings.rate, alpha=alpha, title=name
            )
        with clock.stage("evaluate", name):
            scores[name] = evaluate(student, spec, apart, length=length, title=name)
    report = {
        "fastkd": __version__,
        "settings": asdict(settings) | {"out": str(settings.out)},
        "teacher": teacher.name,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "student_parameters": sum(p.numel() for p in student.parameters()),
        "captured_now": captured,
        "positions": sum(cache.manifest.column("positions").to_pylist()),
        "bytes": sum(cache.manifest.column("bytes").to_pylist()),
        "seconds": clock.seconds | {"all": time.perf_counter() - clock.begun},
        "scores": {name: {k: interval(v).mean for k, v in s._asdict().items()} for name, s in scores.items()},
        "healed_minus_control": {k: v._asdict() for k, v in paired(scores["healed"], scores["control"]).items()},
        "windows": {name: s._asdict() for name, s in scores.items()},
        "losses": losses,
    }
    (settings.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


class WindowsTeacher:
    """The demo's teacher as capture wants it; read when it is first run, so not at all where nothing is missing."""

    max_positions = None
    device = torch.device("cpu")

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self.vocab_size, self.fingerprint = teacher.vocab_size, teacher.name

    @cached_property
    def _model(self) -> CausalModel:
        return self._teacher.model()

    def __call__(self, inputs: torch.Tensor) -> Hidden:
        return Hidden(self._model.hidden(inputs), Head(self._model.head))


def capture_windows(settings: DemoSettings, teacher: Teacher, windows: Array, clock: Clock) -> int:
    """Have the sealed cache of these windows `[n, L]`; how many positions the teacher had to be run on for it."""
    report = capture(
        WindowsTeacher(teacher),
        windows,
        settings.out / "cache",
        k=settings.k,
        draws=settings.draws,
        context=settings.window,
        packing="keep",
        held_out=settings.held_out / len(windows),
        shard_positions=settings.shard_windows * settings.window,
        batch_tokens=settings.shard_windows * settings.window,
        seed=settings.seed,
        progress=mode_for(),
    )
    if not report.positions_captured:
        clock.say("capture: nothing to do, the teacher is not run")
    return report.positions_captured


def teacher_scores(settings: DemoSettings, teacher: Teacher, cache: Cache, apart: Arrays, clock: Clock) -> Scores:
    """The teacher itself against its cached targets: what the codec cost. Kept beside the cache, so computed once."""
    kept = settings.out / "teacher_scores.json"
    if kept.exists() and (found := json.loads(kept.read_text())).pop("spec") == cache.spec.hash:
        clock.say("evaluate: its scores are there from before")
        return Scores(**found)
    scores = evaluate(teacher.model(), cache.spec, apart, length=settings.window, title="teacher")
    kept.write_text(json.dumps({"spec": cache.spec.hash} | scores._asdict()))
    return scores


def training_order(settings: DemoSettings) -> list[list[int]]:
    """The windows of each step: every window once, in an order of the seed's, then all again in another."""
    wanted, size = settings.steps * settings.batch_windows, settings.train_windows
    random = np.random.default_rng(settings.seed)
    numbers = np.concatenate([random.permutation(size) for _ in range(-(-wanted // size))])[:wanted]
    steps: list[list[int]] = numbers.reshape(settings.steps, settings.batch_windows).tolist()
    return steps


def text_of(report: Report) -> str:
    """The report for a person."""
    settings, positions, names = report["settings"], report["positions"], Scores._fields
    ran = f"the teacher ran on {report['captured_now']:,}" if report["captured_now"] else "the teacher did not run"
    lines = [
        report["teacher"],
        f"{positions:,} positions cached, {report['bytes'] / positions:.1f} bytes each; {ran}",
        f"student: one layer in {settings['cut']} removed, {report['student_parameters'] / 1e6:.0f}M parameters left; "
        f"{settings['steps']} steps of {settings['batch_windows'] * settings['window']:,} positions",
        "",
        f"{settings['held_out']:>4} held-out windows    cross-entropy   KL from teacher   top-1 agreement",
    ]
    for name, score in report["scores"].items():
        lines.append(f"  {name:<22}{score[names[0]]:>14.3f}{score[names[1]]:>18.4f}{score[names[2]]:>18.1%}")
    gain = [report["healed_minus_control"][name] for name in names]
    cells = [
        f"{g['mean'] * s:+.{d}f} ± {g['half'] * s:.{d}f}" for g, s, d in zip(gain, (1, 1, 100), (3, 4, 1), strict=True)
    ]
    lines.append(f"  {'healed - control':<22}{cells[0]:>14}{cells[1]:>18}{cells[2]:>17}%")
    lines += [
        "  nats; ±: 95% interval, paired over windows; control: the same student on hard labels alone",
        "  KL against the cached targets, the tail as one outcome; the teacher's own row is what caching cost",
        "",
        "seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in report["seconds"].items()),
        f"{settings['out']}/report.json has each window and each step.",
    ]
    return "\n".join(lines)
