"""A student on the held-out part of a cache, with no teacher; and two students compared, window by window.

found = evaluate(student, "cache")
found.intervals()["kl_bucket"]  # Interval(mean=0.65, half=0.02)
compare(found, evaluate(control, "cache"))["kl_bucket"]

`measures.py` says what is measured. Intervals are of 95%, with windows (a cache's sequences) as the independent units.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from ..cache.reader import Cache, open_cache
from ..data.examples import Examples
from ..errors import StreamError
from ..stream.batch import AnyBatch
from ..stream.cached import DistillLoader
from ..utils.distributed import ALONE, Processes
from ..utils.intervals import Interval, to_json
from .partition import EvalPartition
from .rows import student_rows, teacher_rows
from .windows import Windows

FORMAT = "fastkd-evaluation"
VERSION = 1
_LOGITS = 2**27  # numbers of a micro-batch's logits, at most, where one window has no more
_ALWAYS = {"cross_entropy", "accuracy"}  # measured of every student
_ALWAYS_KNOWN = {"label_known", "cross_entropy_at_least", "tail_mass"}  # of every teacher

LogitsOf = Callable[[Any], Tensor]
"""From a micro-batch (a `MicroBatch` or an `ExampleBatch`) to the logits `[m, V]` of the positions that count,
`micro_batch.targets.index`."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What was measured, by window.

    split, spec, content: which positions of which cache: the split, the spec's hash, a hash of what was read.
    student, teacher: the sums of each window. positions: that went through the student. seconds: its forward took (of
    several processes, in this one), and of how many positions (the first micro-batch, which warms up, is left out where
    there are more). device: where.
    """

    split: str
    spec: str
    content: str
    student: Windows
    teacher: Windows
    positions: int
    seconds: float
    timed_positions: int
    device: str

    @property
    def count(self) -> int:
        """Positions that count."""
        return int(self.student.counts.sum())

    @property
    def windows(self) -> int:
        """Windows that have positions that count."""
        return int((self.student.counts > 0).sum())

    @property
    def positions_per_second(self) -> float:
        """Of the forward alone, logits included."""
        return self.timed_positions / self.seconds if self.seconds else math.inf

    def intervals(self) -> dict[str, Interval]:
        """The student's measures; see `measures.py`."""
        return self.student.intervals()

    def teacher_intervals(self) -> dict[str, Interval]:
        """What the cache knows of the teacher's own; see `measures.py`."""
        return self.teacher.intervals()

    def summary(self) -> dict[str, dict[str, float | None]]:
        """The student's measures and its perplexity, each with mean, low and high: what a log keeps."""
        found = {name: to_json(value) for name, value in self.intervals().items()}
        found["perplexity"] = {
            name: None if x is None else math.exp(min(x, 700.0)) for name, x in found["cross_entropy"].items()
        }
        return found

    def to_json(self) -> dict[str, Any]:
        """All of it, and its summary for who reads the file; JSON can hold it."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "split": self.split,
            "spec": self.spec,
            "content": self.content,
            "positions": self.positions,
            "seconds": self.seconds,
            "timed_positions": self.timed_positions,
            "device": self.device,
            "summary": self.summary(),
            "student": self.student.to_json(),
            "teacher": self.teacher.to_json(),
        }

    @classmethod
    def from_json(cls, data: Any) -> "Evaluation":
        """What `to_json` made. Raises StreamError where it is something else."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise StreamError("evaluation: this is none; what `Evaluation.to_json` returned is needed.")
        if data.get("version") != VERSION:
            raise StreamError(
                f"evaluation: found version {data.get('version')!r}, this fastkd reads {VERSION}; evaluate again."
            )
        try:
            found = cls(
                split=str(data["split"]),
                spec=str(data["spec"]),
                content=str(data["content"]),
                device=str(data["device"]),
                positions=int(data["positions"]),
                timed_positions=int(data["timed_positions"]),
                seconds=float(data["seconds"]),
                student=Windows.from_json(data["student"]),
                teacher=Windows.from_json(data["teacher"]),
            )
            for windows, names in ((found.student, _ALWAYS), (found.teacher, _ALWAYS_KNOWN)):
                if missing := sorted(names - windows.sums.keys()):
                    raise ValueError(f"it has no {', '.join(missing)}")
            if not np.array_equal(found.student.counts, found.teacher.counts):
                raise ValueError("student and teacher have other counts")
            return found
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise StreamError(f"evaluation: damaged ({type(error).__name__}: {error}); evaluate again.") from error


def evaluate(
    student: Any,
    cache: Any,
    *,
    data: Examples | None = None,
    split: str = "held_out",
    batch_tokens: int = 8192,
    max_positions: int | None = None,
    device: torch.device | str | None = None,
    processes: Processes = ALONE,
    progress: bool = False,
) -> Evaluation:
    """Measure a student on a split of a cache, every window once, in the order of the data.

    student: a module with `logits(micro_batch, rows) -> [m, V]` for the flattened positions asked for, or a `LogitsOf`.
        A module is put into evaluation mode, and back. It may have more outcomes than the teacher, not fewer.
    data: of a cache of examples, the labelled `Examples` that it was captured from. A window is then an example.
    batch_tokens: positions a micro-batch, pads included, at most; fewer where its logits would take more than 2^27
        numbers. A window that is longer is alone: its logits are the most that is in memory.
    max_positions: only the first whole windows up to so many positions. device: None, where the student is.
    processes: over which the windows are divided; all of them call it alike, and get the same.
    progress: a bar on stderr.

    Raises StreamError where the split is empty or not to be had, and where logits are not what they have to be.
    """
    if isinstance(cache, (list, tuple)):
        raise StreamError(
            "cache: found a mixture; evaluate on each of its caches, whose windows are then all different."
        )
    cache = cache if isinstance(cache, Cache) else open_cache(cache)
    where = torch.device(device) if device is not None else _device_of(student)
    windows_a_step = _windows_a_step(cache, batch_tokens)
    loader = DistillLoader(
        cache,
        split=split,
        shuffle=False,
        max_positions=max_positions,
        batch_size=windows_a_step,
        micro_tokens=max(1, min(batch_tokens, _LOGITS // cache.spec.vocab_size)),
        device=where,
        data=data,
    )
    source = loader.fingerprint["caches"][0]
    windows = source["sequences"]
    ours, teachers = Windows.empty(windows), Windows.empty(windows)
    logits_of = _logits_of(student)
    divided = EvalPartition(loader, windows, windows_a_step, processes, student)
    clock, positions, done = _Clock(where), 0, divided.window
    bar = tqdm(total=windows, desc=f"evaluate {split}", unit="window", disable=not progress)
    with torch.no_grad(), _evaluating(student), bar:
        for step in divided.steps(logits_of):
            for batch in step.micro_batches:
                positions += batch.positions
                if not batch.count:
                    continue
                with clock.of(batch.positions):
                    logits = logits_of(batch)
                _check(logits, batch, cache)
                window = batch.windows().cpu().numpy() + done
                labels = batch.labels.flatten()[batch.targets.index]
                _check_labels(labels, logits.shape[1], cache)
                rows = student_rows(logits, batch.targets, labels)
                _check_finite(rows["cross_entropy"], window)
                ours.add(window, rows)
                teachers.add(window, teacher_rows(batch.targets, labels))
            done += step.sequences
            bar.update(step.sequences)
    ours, teachers, positions = divided.sum(ours), divided.sum(teachers), divided.total(positions)
    if not ours.counts.any():
        raise StreamError(
            f"split: {split!r} of {cache!r} has {windows} windows, and no position in them counts. Nothing can be "
            "evaluated; capture with more documents held out."
        )
    return Evaluation(
        split=split,
        spec=cache.spec.hash,
        content=source["content"],
        student=ours,
        teacher=teachers,
        positions=positions,
        seconds=clock.seconds,
        timed_positions=clock.positions,
        device=_name_of(where),
    )


def compare(ours: Evaluation, theirs: Evaluation) -> dict[str, Interval]:
    """Our measures minus theirs, in pairs: what a window is like by itself drops out.

    Raises StreamError where they are not of the same windows.
    """
    for name in ("spec", "content"):
        if (a := getattr(ours, name)) != (b := getattr(theirs, name)):
            raise StreamError(
                f"compare: the evaluations are of different windows ({name} {a[:12]} and {b[:12]}). Evaluate both on "
                "the same split of the same cache."
            )
    if not np.array_equal(ours.student.counts, theirs.student.counts):
        raise StreamError("compare: the evaluations count different positions of their windows. Evaluate both again.")
    return ours.student.minus(theirs.student)


class _Clock:
    """Seconds of the forward, and of how many positions."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._first: tuple[float, int] | None = None
        self._rest = (0.0, 0)

    @property
    def seconds(self) -> float:
        return self._timed[0]

    @property
    def positions(self) -> int:
        return self._timed[1]

    @property
    def _timed(self) -> tuple[float, int]:
        return self._rest if self._rest[1] or self._first is None else self._first

    @contextmanager
    def of(self, positions: int) -> Iterator[None]:
        self._wait()
        begun = time.perf_counter()
        yield
        self._wait()
        seconds = time.perf_counter() - begun
        if self._first is None:
            self._first = (seconds, positions)
        else:
            self._rest = (self._rest[0] + seconds, self._rest[1] + positions)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


@contextmanager
def _evaluating(student: Any) -> Iterator[None]:
    """A module in evaluation mode, its submodules as they were afterwards."""
    modes = {m: m.training for m in student.modules()} if isinstance(student, nn.Module) else {}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _logits_of(student: Any) -> LogitsOf:
    logits = getattr(student, "logits", None)
    if logits is not None:
        return lambda batch: logits(batch, rows=batch.targets.index)
    if not callable(student):
        raise StreamError(f"student: got {type(student).__name__}; expected a module with `logits`, or a function.")
    return student  # type: ignore[no-any-return]


def _check(logits: Any, batch: AnyBatch, cache: Cache) -> None:
    found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    need = f"({batch.count}, {cache.spec.vocab_size} or more)"
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != batch.count:
        raise StreamError(f"student: its logits have shape {found}; {need} is needed: the positions that count.")
    if logits.shape[1] < cache.spec.vocab_size:
        raise StreamError(
            f"student: its logits have shape {found}; {need} is needed, the head of the teacher of {cache!r}. Give the "
            "student that vocabulary."
        )


def _check_labels(labels: Tensor, width: int, cache: Cache) -> None:
    if int(labels.max()) >= width:
        raise StreamError(
            f"student: its head has {width} outcomes, and {cache!r} has labels up to {int(labels.max())}. Give the "
            "student the tokenizer's vocabulary."
        )


def _check_finite(cross_entropy: Tensor, window: NDArray[np.int64]) -> None:
    bad = ~torch.isfinite(cross_entropy).cpu().numpy()
    if bad.any():
        raise StreamError(
            f"student: its cross-entropy is not finite at {bad.sum()} positions, the first in window {window[bad][0]}. "
            "Its weights may hold NaN, or it gives a label no probability at all."
        )


def _windows_a_step(cache: Cache, batch_tokens: int) -> int:
    """About a micro-batch of windows."""
    positions, sequences = (int(cache.manifest.column(c).to_numpy().sum()) for c in ("positions", "sequences"))
    return max(1, batch_tokens * max(sequences, 1) // max(positions, 1))


def _device_of(student: Any) -> torch.device:
    first = next(student.parameters(), None) if isinstance(student, nn.Module) else None
    return torch.device("cpu") if first is None else first.device


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
