"""Capturing the shards of a window plan, one after the other, by any number of workers that may be killed at any time.

A shard is one object with its targets, and one for each feature, which is written after it. A shard is captured while
any of them is missing; existing objects are not changed.

Each worker starts with its own share (shard i belongs to worker i mod world_size), then takes shards that others have
not done. Claims prevent duplicate work; if two workers still capture the same shard, the first commit wins. A worker
that is given its shards, by a scheduler that keeps account of them, needs no claims.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from numbers import Integral
from typing import Any

from ..cache import CacheError, CacheWriter, FeatureWriter
from ..cache.manifest import runs
from ..cache.stores import Store
from ..data.documents import Documents
from ..data.examples import Examples
from ..errors import TeacherUnavailable, passes
from ..teachers.tensor_parallel import LeaderFailed, ParallelGroup
from ..utils.numbers import duration, size_text
from ..utils.progress import Mode, Progress
from ..utils.signals import Stop, Stopped
from ..utils.text import are_missing, printable
from ..utils.words import KINDS, counted
from .claims import Claims
from .features.prepare import Feature
from .rows import ShardRows, read_shard_rows
from .shard_runner import CaptureReport, FeatureReport, LostWork, ShardRunner, ShardTask, missing_shards
from .teacher_pass import TeacherPass
from .window_plan import WindowPlan

__all__ = ["CaptureReport", "CaptureRunner", "FeatureReport", "capture_text"]
_FIRST_PAUSE, _POLL_SECONDS = 0.1, 5.0  # while waiting for other workers; each pause is twice the last
_MAX_FAILED = 3  # shards one after another, after which the teacher is given up


class CaptureRunner(ShardRunner):
    """Captures one worker's part of a cache whose spec and plan, and those of its features, are written. For one `run`.

    shards: the numbers of those to capture, in this order; they are taken one or two ahead of the teacher, and the next
        one may have to be waited for. None: all, by claims.
    progress_mode: see `Progress`. sleep: waits for a number of seconds.
    """

    def __init__(
        self,
        teacher_pass: TeacherPass,
        data: Documents | Examples,
        plan: WindowPlan,
        store: Store,
        claims: Claims,
        *,
        features: Sequence[Feature] = (),
        shards: Iterable[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
        group: ParallelGroup | None = None,
        stop: Stop | None = None,
        progress_mode: Mode = "none",
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._stop, self._sleep = stop or Stop(), sleep
        super().__init__(
            teacher_pass,
            data,
            plan,
            store,
            claims,
            features,
            group=group,
            should_stop=lambda: self._group.share(self._stop.asked),
        )
        self._rank, self._world_size, self._progress_mode = rank, world_size, progress_mode
        self._given = shards
        self._group_busy = False  # whether the group runs a shard; otherwise it waits for the leader to share one
        self._todo: list[int] = []
        self._next: int | None = None  # probably the next one of them
        self._prefetched: tuple[int, Future[ShardRows]] | None = None

    def run(self, writer: CacheWriter | None, features: Mapping[str, FeatureWriter] | None = None) -> CaptureReport:
        """Capture until the cache has every shard, or a stop is requested.

        writer: None unless this is the leader. features: the writer of each feature. Raises DataError, TeacherError,
        CacheError, or StoreError.
        """
        shared: CaptureReport | LeaderFailed
        try:
            with self._stop.gently():
                if writer is None:
                    return self._follow()
                self._writers = {"": writer, **(features or {})}
                started = time.perf_counter()
                self._capture_shards()
                seconds = time.perf_counter() - started
                missing = missing_shards(self._store, self._plan, self._features.values())
                if not missing:
                    self._seal()
                busy = self._busy / seconds if seconds else 0.0
                report = replace(self._report, seconds=seconds, teacher_busy=busy)
                shared = report = replace(report, complete=not missing, missing=runs(missing))
                return report
        except BaseException as error:
            shared = LeaderFailed(passes(error))
            raise
        finally:
            self._progress.close()
            if writer is not None and not self._group_busy:  # if the teacher failed, it failed in the whole group
                self._group.share(shared)

    def _capture_shards(self) -> None:
        self._there = {name: self._committed_shards(name, listing=self._given is None) for name in self._writers}
        committed = set(range(self._plan.shards)).intersection(*self._there.values())
        total, workers = self._plan.totals["positions"], self._world_size
        if isinstance(self._given, Sequence):
            mine = {self._checked(index) for index in self._given}
            total, committed, workers = sum(map(self._positions, mine)), committed & mine, 1
        self._progress = Progress(
            total,
            unit=self._words.position,
            already=sum(map(self._positions, committed)),
            shares=("teacher_busy",),
            workers=workers,
            mode=self._progress_mode,
        )
        # its own shards in order, then those of the others in reverse: the others get to those last
        own, others = range(self._rank, self._plan.shards, self._world_size), reversed(range(self._plan.shards))
        order = [*own, *(i for i in others if i % self._world_size != self._rank)]
        self._todo = [i for i in order if i not in committed]
        pool, failed = ThreadPoolExecutor(1, "fastkd-rows"), 0
        try:
            tasks: Iterator[tuple[ShardTask, ShardRows]]
            if self._given is None:
                tasks = ((shard, self._read_rows(shard.index, pool)) for shard in self._claimed_shards())
            else:
                tasks = self._given_shards(self._given, pool)
            for shard, rows in tasks:
                self._collect(wait=False)
                self._group_busy = True
                self._group.share(shard)
                try:
                    made = self._run(shard, rows)
                except TeacherUnavailable as error:
                    self._group_busy = False
                    self._leave(shard.index, error)
                    failed += 1
                    if failed == _MAX_FAILED:
                        self._progress.say(f"{failed} shards failed one after another: giving up")
                        if self._given is not None:  # which may be waiting for its next number
                            self._stop()
                        break
                    continue
                self._group_busy, failed = False, 0
                self._submit(shard, rows, *made)
            self._collect(wait=True)
        except Stopped:
            if self._group_busy:  # in a shard: between two, nothing is lost
                seconds = time.perf_counter() - self._run_begun
                self._report = replace(self._report, lost=LostWork(shard.index, self._run_positions, seconds))
            self._group_busy = False
            self._collect(wait=True)
        finally:
            pool.shutdown(cancel_futures=True)
            for name in self._claims.held:
                self._claims.drop(name)

    def _given_shards(self, shards: Iterable[int], pool: ThreadPoolExecutor) -> Iterator[tuple[ShardTask, ShardRows]]:
        """The given shards that are not there, with their rows: the next one is waited for, and read, on the pool's
        thread while the teacher runs."""
        numbers = iter(shards)

        def read() -> tuple[ShardTask, ShardRows] | None:
            for index in numbers:
                if lacking := self._lacking(self._checked(index)):
                    task = ShardTask(index, "" in lacking, tuple(name for name in lacking if name))
                    return task, read_shard_rows(self._plan, self._data, index)
                there.append(index)
            return None

        there: list[int] = []
        future = pool.submit(read)
        while True:
            while not wait([future], _FIRST_PAUSE).done:
                self._collect(wait=False)
                if self._stop.asked:
                    raise Stopped
            found = future.result()
            while there:
                index = there.pop()
                self._progress.event("there", shard=index, positions=self._positions(index), captured=False)
            if found is None:
                return
            future = pool.submit(read)
            yield found

    def _checked(self, index: int) -> int:
        """The number of a shard that is given. CacheError if the plan has none of that number."""
        if isinstance(index, bool) or not isinstance(index, Integral) or not 0 <= index < self._plan.shards:
            raise CacheError(f"shards: got {index!r}; expected numbers from 0 to {self._plan.shards - 1}.")
        return int(index)

    def _leave(self, index: int, error: TeacherUnavailable) -> None:
        """Leave a shard to a later run: the teacher does not answer, and the others may be answered."""
        self._progress.found(-self._run_positions)
        self._report = replace(self._report, failed={**self._report.failed, index: str(error)})
        text = f"shard {index} is left to a later run: {error}"
        self._progress.event("failed", shard=index, positions=self._run_positions, why=str(error), text=text)
        self._claims.drop(str(index))

    def _follow(self) -> CaptureReport:
        """Run the teacher on the shards that the leader shares. Returns its report; see `LeaderFailed.error`."""
        nothing: Any = None  # the leader's is shared
        while isinstance(shared := self._group.share(nothing), ShardTask):
            with suppress(Stopped):
                self._run(shared, read_shard_rows(self._plan, self._data, shared.index))
        if not isinstance(shared, CaptureReport):
            raise shared.error
        return shared

    def _claimed_shards(self) -> Iterator[ShardTask]:
        """The shards that this worker claims, one at a time; waits for shards that others have claimed."""
        pause = _FIRST_PAUSE
        while self._todo:
            if self._stop.asked:
                raise Stopped
            left, i = float("inf"), 0
            while i < len(self._todo):
                index = self._todo[i]
                if not (lacking := self._lacking(index)):
                    del self._todo[i]
                    self._progress.found(self._positions(index))
                elif seconds := self._claims.take(str(index)):
                    left, i = min(left, seconds), i + 1
                else:
                    del self._todo[i]
                    self._next = self._todo[i] if i < len(self._todo) else None
                    pause = _FIRST_PAUSE
                    yield ShardTask(index, "" in lacking, tuple(name for name in lacking if name))
                    break  # from the start again: claims of others may have expired
            else:
                self._collect(wait=False)
                self._claims.keep()
                if self._todo:
                    if pause == _FIRST_PAUSE:
                        claimed = counted(len(self._todo), "shard")
                        self._progress.say(f"waiting for other workers, which have claimed {claimed}")
                    self._sleep(min(left, pause))
                    pause = min(2 * pause, _POLL_SECONDS)

    def _read_rows(self, index: int, pool: ThreadPoolExecutor) -> ShardRows:
        """The rows of a shard, prefetched if it was expected; then the next shard's are prefetched."""
        prefetched, self._prefetched = self._prefetched, None
        if prefetched is not None and prefetched[0] == index:
            rows = prefetched[1].result()
        else:
            if prefetched is not None:
                prefetched[1].exception()  # one reader at a time
            rows = read_shard_rows(self._plan, self._data, index)
        if self._next is not None:
            self._prefetched = self._next, pool.submit(read_shard_rows, self._plan, self._data, self._next)
        return rows


def capture_text(report: CaptureReport) -> str:
    """What a capture did, and what remains to be done."""
    totals = report.plan
    if not totals["shards"] and not report.complete:  # of workers elsewhere, of which none has told its plan
        return (
            printable(f"{report.cache}: stopped before the first shard") + "\nRun the same command again to continue."
        )
    words = KINDS[report.kind]
    data = words.counted(totals["positions"], totals["windows"]) if report.kind != "text" else ""
    data = data or counted(totals["positions"], "position")
    lines = [f"{report.cache}: {data} in {counted(totals['shards'], 'shard')}"]
    lines[0] += ", complete and sealed" if report.complete else f"; work remains: {are_missing(report.missing)}"
    features = {name: feature for name, feature in report.features.items() if feature.shards_written}
    if report.shards_written or features:
        run = f"{duration(report.seconds)}, {report.positions_captured / report.seconds:,.0f} {words.positions}/s, "
        run += f"teacher busy {report.teacher_busy:.0%}"
        if report.shards_written:
            each = report.bytes_written / report.positions_written
            run += f", {size_text(report.bytes_written)}, {each:.1f} B each"
            shards = counted(report.shards_written, "shard")
            lines.append(f"this run: {shards}, {counted(report.positions_written, words.position)} in {run}")
        else:
            lines.append(f"this run: features of {counted(report.positions_captured, words.position)} in {run}")
    elif report.positions_captured:
        ran = counted(report.positions_captured, words.position)
        lines.append(f"this run: no shard; the teacher ran {ran} of shards that others wrote first, or that were left")
    elif report.complete:
        lines.append("this run: nothing to do, the teacher did not run")
    for name, feature in features.items():
        each = feature.bytes_written / max(feature.positions_written, 1)
        lines.append(
            f"feature {name}: {counted(feature.shards_written, 'shard')}, "
            f"{counted(feature.positions_written, words.position)}, "
            f"{size_text(feature.bytes_written)}, {each:.1f} B each, step {feature.step:g}"
        )
    if report.batches_halved:
        lines.append(f"{report.batches_halved:,} batches did not fit into memory and were halved; this is recorded")
    for index, why in report.failed.items():
        lines.append(f"shard {index} was left: {why}")
    if report.lost is not None:
        there = totals["shards"] - sum(last - first + 1 for first, last in report.missing)
        lines.append(f"{report.lost}; {counted(there, 'shard')} {'is' if there == 1 else 'are'} kept")
    if not report.complete:
        lines.append("Run the same command again to continue.")
    return "\n".join(printable(line) for line in lines)
