"""The job: shards of a plan, run and committed one after the other, by any number of workers that may die.

Each worker takes its own share first (shard i is worker i mod world_size's), then what others have left. Claims keep
two from doing the same; where they do it all the same, the first commit wins and the other is told.
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
from ..cache.scan import listed, shard_key
from ..cache.stores import Store
from ..data.documents import Documents
from ..data.examples import Examples
from ..teachers.workers import Group, SingleProcess
from ..utils.inspect_cache import runs
from ..utils.progress import Progress
from ..utils.signals import DONE, WORK_REMAINS, Stop, Stopped
from .claims import Claims
from .rows import Rows, rows
from .teacher_pass import Runner
from .window_plan import Plan

_FIRST_PAUSE, _POLL_SECONDS = 0.1, 5.0  # between two looks at what others do; each is twice as long as the last


@dataclass(frozen=True)
class CaptureReport:
    """What a capture did.

    complete: every shard of the plan is there, and the cache is sealed. missing: shards, [from, to]. plan: see
    `Plan.totals`. What this worker did, now: shards_written, with positions_written and bytes_written;
    positions_captured, those included that another worker wrote first; seconds; teacher_busy (share of them in which
    the teacher ran); batches_halved (which did not fit into memory).
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
        """The exit status: 0 where the cache is complete, 75 where work remains."""
        return DONE if self.complete else WORK_REMAINS

    def to_json(self) -> dict[str, Any]:
        """The report, for a machine."""
        return {**asdict(self), "status": self.status}


class Job:
    """One worker's part in filling a cache whose spec and plan are there. For one `run`.

    progress_mode: see `Progress`. sleep: waits so many seconds.
    """

    def __init__(
        self,
        runner: Runner,
        data: Documents | Examples,
        plan: Plan,
        store: Store,
        claims: Claims,
        *,
        rank: int = 0,
        world_size: int = 1,
        group: Group | None = None,
        stop: Stop | None = None,
        progress_mode: str = "none",
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._data, self._plan, self._store, self._claims = data, plan, store, claims
        self._rank, self._world_size, self._progress_mode = rank, world_size, progress_mode
        self._progress = Progress(0, unit="position", shares=("teacher_busy",))  # nobody listens yet
        self._group, self._stop, self._sleep = group or SingleProcess(), stop or Stop(), sleep
        self._runner = replace(runner, on_batch=self._on_batch, should_stop=self._should_stop)
        self._together = False  # whether the others of the group are at a shard; else they wait to be told of one
        self._todo: list[int] = []
        self._next: int | None = None  # of those, the one that is probably taken next
        self._submitted: dict[int, Future[Commit]] = {}
        self._sizes: Mapping[int, int] = {}  # of the shards that were committed here
        self._ahead: tuple[int, Future[Rows]] | None = None
        self._busy = 0.0
        self._partial = 0  # positions of a shard that is not committed yet
        self._report = CaptureReport(store.describe(), False, [], plan.totals)

    def run(self, writer: CacheWriter | None) -> CaptureReport:
        """Work until every shard is there, or a stop is asked for. writer: the leader's; None in the others.

        Raises what a stage of the work raised: DataError, TeacherError, CacheError, or StoreError where a store failed.
        """
        self._stop.gentle = True
        report: CaptureReport | None = None
        try:
            if writer is None:
                return self._follow()
            report = self._lead(writer)
            return report
        finally:
            self._stop.gentle = False
            self._progress.close()
            if writer is not None and not self._together:  # where the teacher failed, it failed in all of them
                self._group.share(report)

    def _there(self) -> set[int]:
        """The shards that are there. CacheError where nothing can be added to them."""
        sealed = self._is_there(MANIFEST_KEY)  # asked for first: another worker may just be at its end
        there = set(listed(self._store))
        if strange := sorted(there - set(range(self._plan.shards))):
            raise CacheError(
                f"{self._store.describe()}: shard {strange[0]} is there, and the plan has {self._plan.shards}: it is "
                "of something else. Write to another place."
            )
        if sealed and len(there) < self._plan.shards:
            raise CacheError(
                f"{self._store.describe()}: the cache is sealed, with {len(there)} of {self._plan.shards} shards. To "
                f"write the others, delete {MANIFEST_KEY} (no target is lost by that); it is made again at the end."
            )
        return there

    def _lead(self, writer: CacheWriter) -> CaptureReport:
        begun = time.perf_counter()
        self._work(writer)
        seconds = time.perf_counter() - begun
        missing = set(range(self._plan.shards)) - set(listed(self._store))
        if not missing:
            cache = open_cache(self._store)
            if not cache.sealed or len(cache.manifest) != self._plan.shards:
                writer.seal()
        busy = self._busy / seconds if seconds else 0.0
        return replace(self._report, complete=not missing, missing=runs(missing), seconds=seconds, teacher_busy=busy)

    def _work(self, writer: CacheWriter) -> None:
        there = self._there()
        self._sizes = writer.sizes
        self._progress = Progress(
            self._plan.totals["positions"],
            unit="position",
            already=sum(map(self._positions, there)),
            shares=("teacher_busy",),
            workers=self._world_size,
            mode=self._progress_mode,
        )
        # its own shards in order, then those of others from their ends: where those are taken up last
        own, others = range(self._rank, self._plan.shards, self._world_size), reversed(range(self._plan.shards))
        order = [*own, *(i for i in others if i % self._world_size != self._rank)]
        self._todo = [i for i in order if i not in there]
        pool = ThreadPoolExecutor(1, "fastkd-rows")
        try:
            for index in self._taken():
                some = self._rows(index, pool)
                self._collect(wait=False)
                self._together = True
                self._group.share(index)
                said = self._ask(index, some)
                self._together = False
                self._submit(index, some, writer, *said)
            self._collect(wait=True)
        except Stopped:
            self._together = False
            self._collect(wait=True)
        finally:
            pool.shutdown(cancel_futures=True)
            for name in self._claims.held:
                self._claims.drop(name)

    def _follow(self) -> CaptureReport:
        """Run what the leader runs. Returns what it reports; CacheError where it failed."""
        while isinstance(told := self._group.share(None), int):
            with suppress(Stopped):
                self._ask(told, rows(self._plan, self._data, told))
        if not isinstance(told, CaptureReport):
            raise CacheError("the process that leads this worker failed; its message says why.")
        return told

    def _taken(self) -> Iterator[int]:
        """The shards that this worker is to do, one at a time; waits where others may still be at theirs."""
        pause = _FIRST_PAUSE
        while self._todo:
            if self._stop.asked:
                raise Stopped
            left, place = float("inf"), 0
            while place < len(self._todo):
                index = self._todo[place]
                if self._is_there(shard_key(index)):
                    del self._todo[place]
                    self._progress.found(self._positions(index))
                elif seconds := self._claims.take(str(index)):
                    left, place = min(left, seconds), place + 1
                else:
                    del self._todo[place]
                    self._next = self._todo[place] if place < len(self._todo) else None
                    pause = _FIRST_PAUSE
                    yield index
                    break  # from the first again: what another left may have come free
            else:
                self._collect(wait=False)
                self._claims.keep()
                if self._todo:
                    if pause == _FIRST_PAUSE:
                        self._progress.say(f"{len(self._todo)} shards are with other workers; waiting for them")
                    self._sleep(min(left, pause))
                    pause = min(2 * pause, _POLL_SECONDS)

    def _rows(self, index: int, pool: ThreadPoolExecutor) -> Rows:
        """The rows of a shard, read ahead where it was foreseen; then the next one's are read ahead."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == index:
            some = ahead[1].result()
        else:
            if ahead is not None:
                ahead[1].exception()  # one reader at a time
            some = rows(self._plan, self._data, index)
        if self._next is not None:
            self._ahead = self._next, pool.submit(rows, self._plan, self._data, self._next)
        return some

    def _ask(self, index: int, some: Rows) -> tuple[dict[str, Any], dict[str, list[int]]]:
        """What the teacher says of a shard: see `Runner.run`."""
        self._partial = 0
        try:
            return self._runner.run(some, self._plan.batches(index), self._data, index)
        except BaseException:
            self._progress.found(-self._partial)
            raise

    def _submit(
        self, index: int, some: Rows, writer: CacheWriter, arrays: dict[str, Any], halved: dict[str, list[int]]
    ) -> None:
        """Give a shard to the writer."""
        device = self._runner.teacher.device
        record = {
            "fastkd": __version__,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "batch_tokens": self._plan.settings.batch_tokens,
            "halved": halved,
        }
        self._report = replace(
            self._report,
            positions_captured=self._report.positions_captured + len(some),
            batches_halved=self._report.batches_halved + len(halved),
        )
        self._submitted[index] = writer.submit_shard(
            index,
            some.inputs,
            **arrays,
            sequence_lengths=some.sequence_lengths,
            document_lengths=some.document_lengths,
            first_sequence=some.first_sequence,
            record=record,
        )

    def _collect(self, *, wait: bool) -> None:
        """What became of the shards that the writer has; raises what it raised."""
        for index, future in list(self._submitted.items()):
            if not (wait or future.done()):
                continue
            commit = future.result()
            del self._submitted[index]
            self._claims.done(str(index))
            if commit is Commit.ALREADY_THERE:
                self._progress.say(f"shard {index}: another worker was faster")
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
        self._partial += positions
        self._progress.add(positions, teacher_busy=seconds)
        if self._group.leader:
            self._claims.keep()

    def _should_stop(self) -> bool:
        return self._group.share(self._stop.asked)

    def _is_there(self, key: str) -> bool:
        try:
            self._store.get_tail(key, 1)
        except NotFound:
            return False
        return True

    def _positions(self, index: int) -> int:
        return int(self._plan.shard_rows[index + 1] - self._plan.shard_rows[index])
