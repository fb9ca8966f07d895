"""Capturing the shards of a window plan, one after the other, by any number of workers that may be killed at any time.

Each worker starts with its own share (shard i belongs to worker i mod world_size), then takes shards that others have
not done. Claims prevent duplicate work; if two workers still capture the same shard, the first commit wins.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from .. import __version__
from ..cache import CacheError, CacheWriter, Commit, NotFound, open_cache
from ..cache.manifest import KEY as MANIFEST_KEY
from ..cache.manifest import listed, runs, shard_key
from ..cache.stores import Store
from ..data.documents import Documents
from ..data.examples import Examples
from ..teachers.tensor_parallel import ParallelGroup
from ..utils.numbers import duration, size_text
from ..utils.progress import Progress
from ..utils.signals import DONE, WORK_REMAINS, Stop, Stopped
from ..utils.text import printable, ranges
from .claims import Claims
from .rows import ShardRows, read_shard_rows
from .teacher_pass import TeacherPass, device_name
from .window_plan import WindowPlan

_FIRST_PAUSE, _POLL_SECONDS = 0.1, 5.0  # while waiting for other workers; each pause is twice the last


@dataclass(frozen=True)
class CaptureReport:
    """What a capture did.

    complete: whether the cache has every shard, and is sealed. missing: the other shards, as ranges [first, last].
    plan: `WindowPlan.totals`. The rest is about this worker in this run: shards_written, positions_written and
    bytes_written; positions_captured, including shards that another worker committed first; seconds; teacher_busy, the
    fraction of them in which the teacher ran; batches_halved, because they did not fit into memory.
    """

    cache: str
    complete: bool
    missing: list[list[int]]
    plan: dict[str, int]
    shards_written: int = 0
    positions_written: int = 0
    positions_captured: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    teacher_busy: float = 0.0
    batches_halved: int = 0

    @property
    def status(self) -> int:
        """The exit status: 0 if the cache is complete, 75 if work remains."""
        return DONE if self.complete else WORK_REMAINS

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {**asdict(self), "status": self.status}


class CaptureRunner:
    """Captures one worker's part of a cache whose spec and plan are written. For one `run`.

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
        rank: int = 0,
        world_size: int = 1,
        group: ParallelGroup | None = None,
        stop: Stop | None = None,
        progress_mode: str = "none",
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._data, self._plan, self._store, self._claims = data, plan, store, claims
        self._rank, self._world_size, self._progress_mode = rank, world_size, progress_mode
        self._progress = Progress(0, unit="position", shares=("teacher_busy",))  # replaced when the work begins
        self._group, self._stop, self._sleep = group or ParallelGroup(), stop or Stop(), sleep
        self._pass = replace(
            teacher_pass, on_batch=self._on_batch, should_stop=lambda: self._group.share(self._stop.asked)
        )
        self._group_busy = False  # whether the group runs a shard; otherwise it waits for the leader to share one
        self._todo: list[int] = []
        self._next: int | None = None  # probably the next one of them
        self._submitted: dict[int, Future[Commit]] = {}
        self._sizes: Mapping[int, int] = {}  # bytes of the shards that this worker committed
        self._prefetched: tuple[int, Future[ShardRows]] | None = None
        self._busy = 0.0
        self._report = CaptureReport(store.describe(), False, [], plan.totals)

    def run(self, writer: CacheWriter | None) -> CaptureReport:
        """Capture until the cache has every shard, or a stop is requested. writer: None unless this is the leader.

        Raises DataError, TeacherError, CacheError, or StoreError.
        """
        self._stop.gentle = True
        report: CaptureReport | None = None
        try:
            if writer is None:
                return self._follow()
            started = time.perf_counter()
            self._capture_shards(writer)
            seconds = time.perf_counter() - started
            missing = set(range(self._plan.shards)) - set(listed(self._store))
            if not missing:
                cache = open_cache(self._store)
                if not cache.sealed or len(cache.manifest) != self._plan.shards:
                    writer.seal()
            busy = self._busy / seconds if seconds else 0.0
            report = replace(self._report, seconds=seconds, teacher_busy=busy)
            report = replace(report, complete=not missing, missing=runs(missing))
            return report
        finally:
            self._stop.gentle = False
            self._progress.close()
            if writer is not None and not self._group_busy:  # if the teacher failed, it failed in the whole group
                self._group.share(report)

    def _committed_shards(self) -> set[int]:
        """The shards that the cache has. CacheError if no shards can be added to it."""
        sealed = self._exists(MANIFEST_KEY)  # before the shards: another worker may be about to seal
        committed = set(listed(self._store))
        if unknown := sorted(committed - set(range(self._plan.shards))):
            raise CacheError(
                f"{self._store.describe()}: got shard {unknown[0]}; expected only the {self._plan.shards} shards of "
                "the plan. It belongs to something else: write to another folder."
            )
        if sealed and len(committed) < self._plan.shards:
            raise CacheError(
                f"{self._store.describe()}: the cache is sealed, with {len(committed)} of {self._plan.shards} shards. "
                f"To write the others, delete {MANIFEST_KEY}: no target is lost, and it is written again at the end."
            )
        return committed

    def _capture_shards(self, writer: CacheWriter) -> None:
        committed = self._committed_shards()
        self._sizes = writer.sizes
        self._progress = Progress(
            self._plan.totals["positions"],
            unit="position",
            already=sum(map(self._positions, committed)),
            shares=("teacher_busy",),
            workers=self._world_size,
            mode=self._progress_mode,
        )
        # its own shards in order, then those of the others in reverse: the others get to those last
        own, others = range(self._rank, self._plan.shards, self._world_size), reversed(range(self._plan.shards))
        order = [*own, *(i for i in others if i % self._world_size != self._rank)]
        self._todo = [i for i in order if i not in committed]
        pool = ThreadPoolExecutor(1, "fastkd-rows")
        try:
            for index in self._claimed_shards():
                rows = self._read_rows(index, pool)
                self._collect(wait=False)
                self._group_busy = True
                self._group.share(index)
                answers = self._pass.run(rows, self._plan.batches(index), self._data, index)
                self._group_busy = False
                self._submit(index, rows, writer, *answers)
            self._collect(wait=True)
        except Stopped:
            self._group_busy = False
            self._collect(wait=True)
        finally:
            pool.shutdown(cancel_futures=True)
            for name in self._claims.held:
                self._claims.drop(name)

    def _follow(self) -> CaptureReport:
        """Run the teacher on the shards that the leader shares. Returns its report; CacheError if it failed."""
        while isinstance(shared := self._group.share(None), int):
            with suppress(Stopped):
                rows = read_shard_rows(self._plan, self._data, shared)
                self._pass.run(rows, self._plan.batches(shared), self._data, shared)
        if not isinstance(shared, CaptureReport):
            raise CacheError("the leading process of this worker failed; see its error message.")
        return shared

    def _claimed_shards(self) -> Iterator[int]:
        """The shards that this worker claims, one at a time; waits for shards that others have claimed."""
        pause = _FIRST_PAUSE
        while self._todo:
            if self._stop.asked:
                raise Stopped
            left, i = float("inf"), 0
            while i < len(self._todo):
                index = self._todo[i]
                if self._exists(shard_key(index)):
                    del self._todo[i]
                    self._progress.found(self._positions(index))
                elif seconds := self._claims.take(str(index)):
                    left, i = min(left, seconds), i + 1
                else:
                    del self._todo[i]
                    self._next = self._todo[i] if i < len(self._todo) else None
                    pause = _FIRST_PAUSE
                    yield index
                    break  # from the start again: claims of others may have expired
            else:
                self._collect(wait=False)
                self._claims.keep()
                if self._todo:
                    if pause == _FIRST_PAUSE:
                        self._progress.say(f"waiting for other workers, which have claimed {len(self._todo)} shards")
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

    def _submit(
        self, index: int, rows: ShardRows, writer: CacheWriter, arrays: dict[str, Any], halved: dict[str, list[int]]
    ) -> None:
        """Give a shard to the writer."""
        record = {
            "fastkd": __version__,
            "torch": torch.__version__,
            "device": device_name(self._pass.teacher.device),
            "batch_tokens": self._plan.settings.batch_tokens,
            "halved": halved,
        }
        self._report = replace(
            self._report,
            positions_captured=self._report.positions_captured + len(rows),
            batches_halved=self._report.batches_halved + len(halved),
        )
        self._submitted[index] = writer.submit_shard(
            index,
            rows.inputs,
            **arrays,
            sequence_lengths=rows.sequence_lengths,
            document_lengths=rows.document_lengths,
            first_sequence=rows.first_sequence,
            record=record,
        )

    def _collect(self, *, wait: bool) -> None:
        """Account for the shards that the writer has finished, or wait for all; raises what the writer raised."""
        for index, future in list(self._submitted.items()):
            if not (wait or future.done()):
                continue
            commit = future.result()
            del self._submitted[index]
            self._claims.done(str(index))
            if commit is Commit.ALREADY_THERE:
                self._progress.say(f"shard {index}: another worker committed it first")
                continue
            size = self._sizes[index]
            self._report = replace(
                self._report,
                shards_written=self._report.shards_written + 1,
                positions_written=self._report.positions_written + self._positions(index),
                bytes_written=self._report.bytes_written + size,
            )
            each = size / self._positions(index)
            self._progress.figure("bytes_per_position", each, f"{each:.1f} B each")
            self._progress.event("shard", shard=index, positions=self._positions(index), bytes=size)

    def _on_batch(self, positions: int, seconds: float) -> None:
        self._busy += seconds
        self._progress.add(positions, teacher_busy=seconds)
        if self._group.leader:
            self._claims.keep()

    def _exists(self, key: str) -> bool:
        try:
            self._store.get_tail(key, 1)
        except NotFound:
            return False
        return True

    def _positions(self, index: int) -> int:
        return int(self._plan.shard_rows[index + 1] - self._plan.shard_rows[index])


def capture_text(report: CaptureReport) -> str:
    """What a capture did, and what remains to be done."""
    totals = report.plan
    lines = [f"{report.cache}: {totals['positions']:,} positions in {totals['shards']:,} shards"]
    lines[0] += (
        ", complete and sealed" if report.complete else f"; work remains: shards {ranges(report.missing)} are missing"
    )
    if report.shards_written:
        speed = report.positions_captured / report.seconds
        each = report.bytes_written / report.positions_written
        lines.append(
            f"this run: {report.shards_written:,} shards, {report.positions_written:,} positions in "
            f"{duration(report.seconds)}, {speed:,.0f} positions/s, teacher busy {report.teacher_busy:.0%}, "
            f"{size_text(report.bytes_written)}, {each:.1f} B each"
        )
    elif report.complete:
        lines.append("this run: nothing to do, the teacher did not run")
    if report.batches_halved:
        lines.append(f"{report.batches_halved:,} batches did not fit into memory and were halved; this is recorded")
    if not report.complete:
        lines.append("Run the same command again to continue.")
    return "\n".join(printable(line) for line in lines)
