"""A student on the held-out part of a cache, without a teacher; and two students compared, window by window.

`measures.py` says what is measured. Intervals are of 95%, with windows (a cache's sequences) as the independent units.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..cache.reader import Cache, open_cache
from ..data.examples import Examples, as_examples
from ..errors import StreamError
from ..stream.cached import CachedSource
from ..stream.shard_source import ShardSource
from ..utils.distributed import ALONE, Processes
from ..utils.intervals import TAIL, Interval
from ..utils.progress import counting
from ..utils.words import counted, words_of
from .forward import EvalPartition, StudentForward, check_finite
from .result import Evaluation, Windows
from .rows import Rows, student_rows, teacher_rows
from .slices import SLICES, slice_numbers

__all__ = ["Evaluation", "compare", "evaluate"]
_MAX_LOGITS = 2**27  # numbers in the logits of a micro-batch, unless one window has more


def evaluate(
    student: Any,
    cache: Any,
    *,
    data: Examples | None = None,
    split: str = "held_out",
    batch_tokens: int = 8192,
    max_positions: int | None = None,
    allow_partial: bool = False,
    device: torch.device | str | None = None,
    processes: Processes = ALONE,
    progress: bool = False,
    buckets: Any = None,
    further: Callable[[Any, Tensor], Rows] | None = None,
) -> Evaluation:
    """Measure a student on a split of a cache, every window once, in the order of the data.

    cache: a `Cache`, what `open_cache` takes, or a source of one split whose targets are made on the way (a
        `fastkd.live.LiveSource`) with `evaluation_sizes` and shuffle=False; split, max_positions, allow_partial and
        data are then its own.
    student: a module with `logits(micro_batch, rows) -> [m, V]` for flattened positions, or a function from a
        micro-batch to the logits `[m, V]` of its positions that count. A module is evaluated in evaluation mode, and
        its modes are restored. It may have more outcomes than the teacher, not fewer.
    data: for a cache of examples, the labelled `Examples` that it was captured from. A window is then an example.
    batch_tokens: maximum positions per micro-batch, pads included; fewer if its logits would have more than 2^27
        numbers. A longer window is alone: its logits are the most that is in memory.
    max_positions: only the first whole windows with at most this many positions. allow_partial: accept a split with
        missing shards. device: None, the student's.
    processes: the windows are divided over them; all call this function alike, and get the same result.
    progress: show it on stderr. buckets: of a student that is compiled, as of `CachedSource`.
    further: more measures by name, `[m]` each, of the positions that count, from the micro-batch and the logits. It is
        called once for each micro-batch with such positions, in the order of the data. Not with several processes.

    Raises StreamError if the split is empty or does not exist, and for logits of a wrong shape or that are not finite.
    """
    data = as_examples(data)
    if isinstance(cache, (list, tuple)):
        raise StreamError("cache: got a mixture; expected one cache. Evaluate on each of its caches.")
    first = next(student.parameters(), None) if isinstance(student, nn.Module) else None
    where = torch.device(device or (first.device if first is not None else "cpu"))
    if isinstance(cache, ShardSource):
        source = cache
        split = source.fingerprint["split"]
        if source.fingerprint["shuffle"] or source.fingerprint["batch_size"] is None:
            raise StreamError("cache: got a source that is shuffled, or without batch_size; expected evaluation_sizes.")
    else:
        cache = cache if isinstance(cache, Cache) else open_cache(cache)
        totals = (int(cache.manifest.column(name).to_numpy().sum()) for name in ("positions", "sequences"))
        cached_positions, cached_windows = totals
        source = CachedSource(
            cache,
            split=split,
            shuffle=False,
            max_positions=max_positions,
            allow_partial=allow_partial,
            **evaluation_sizes(cached_positions, cached_windows, cache.spec.vocab_size, batch_tokens),
            device=where,
            data=data,
            buckets=buckets,
        )
    origin = source.origins[0]
    evaluated = source.described[0]
    windows = evaluated["sequences"]
    ours, teachers, positions = Windows.empty(windows), Windows.empty(windows), 0
    sliced = Windows.empty(windows * len(SLICES))
    forward = StudentForward(student, origin, where)
    partition = EvalPartition(source, windows, processes, student)
    done = partition.first_window
    words = words_of(origin.spec.inputs)
    bar = counting(windows, words.window, f"evaluate {split}", shown=progress)
    with forward.evaluating(), bar:
        for step in partition.steps(forward.repeat):
            for batch in step.micro_batches:
                positions += batch.positions
                if not batch.count:
                    continue
                batch = forward.answered(batch)
                logits = forward.timed(batch)
                window = batch.windows().cpu().numpy() + done
                labels = batch.labels.flatten()[batch.targets.index]
                rows = student_rows(logits, batch.targets, labels)
                check_finite(rows["cross_entropy"], window)
                rows |= {} if further is None else further(batch, logits)
                ours.add(window, rows)
                teachers.add(window, teacher := teacher_rows(batch.targets, labels))
                sliced.add_sliced(window, rows, slice_numbers(teacher))
            done += step.sequences
            bar.add(step.sequences)
    (ours, teachers, sliced), positions = partition.sum([ours, teachers, sliced], positions)
    if not ours.counts.any():
        raise StreamError(
            f"split: got {split!r} of {origin!r} with {counted(windows, words.window)}, in which no {words.position} "
            f"counts. Capture with more {words.documents} held out."
        )
    seconds, timed_positions = forward.time()
    return Evaluation(
        split=split,
        spec=origin.spec.hash,
        content=evaluated["content"],
        positions=positions,
        seconds=seconds,
        timed_positions=timed_positions,
        device=torch.cuda.get_device_name(where) if where.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        student=ours,
        teacher=teachers,
        slices=sliced.sliced(),
        kind=words.kind,
    )


def evaluation_sizes(positions: int, windows: int, vocab_size: int, batch_tokens: int) -> dict[str, Any]:
    """`batch_size` and `micro_tokens` of the source of an evaluation: steps of about a micro-batch each.

    positions, windows: of all data, of both splits.
    """
    return {
        "batch_size": max(1, batch_tokens * max(windows, 1) // max(positions, 1)),
        "micro_tokens": max(1, min(batch_tokens, _MAX_LOGITS // vocab_size)),
    }


def compare(ours: Evaluation, theirs: Evaluation, *, tail: float = TAIL) -> dict[str, Interval]:
    """Our measures minus theirs, paired by window: differences between windows drop out. tail: the share outside an
    interval at either end; other than 2.5%, without the calibration error.

    Raises StreamError if they are not of the same windows.
    """
    check_same_windows(ours, theirs)
    return ours.student.minus(theirs.student, tail=tail)


def compare_slices(
    ours: Evaluation, theirs: Evaluation, *, tail: float = TAIL, least: int = 2
) -> dict[str, dict[str, Interval]]:
    """The same within each slice that both have, with positions in at least `least` windows. tail: the share outside an
    interval at either end. Raises StreamError as `compare`."""
    check_same_windows(ours, theirs)
    return {
        name: one.minus(theirs.slices[name], tail=tail)
        for name, one in ours.slices.items()
        if name in theirs.slices and (one.counts > 0).sum() >= least
    }


def check_same_windows(ours: Evaluation, theirs: Evaluation) -> None:
    """Raise StreamError unless two evaluations are of the same windows, and count the same positions."""
    for name in ("spec", "content"):
        if (a := getattr(ours, name)) != (b := getattr(theirs, name)):
            raise StreamError(
                f"compare: got evaluations of different {ours.words.windows} ({name} {a[:12]} and {b[:12]}). Evaluate "
                "both on the same split of the same cache."
            )
    if not np.array_equal(ours.student.counts, theirs.student.counts):
        positions = ours.words.positions
        raise StreamError(f"compare: got evaluations that count different {positions}. Evaluate both again.")
