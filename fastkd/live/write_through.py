"""A cache that is written while a student trains: the first training of a teacher captures what it reads.

Shards are captured whole, as `fastkd.capture` does it (the same teacher batches, claims, and bytes), when the order of
the training first opens them; what is trained on is read back from them. A thread of the loader that needs a shard asks
for it, and the thread that trains runs the teacher, between two steps: so the teacher and the student never compete for
the device, and while it waits it has something to do. Writers encode and commit on threads of their own. When a stop is
requested, no further batch of the teacher is run, and the step that waits for the shard is not made.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack

from ..cache import open_cache
from ..cache.reader import Cache
from ..cache.stores import Store
from ..capture.begin import Begun, begin_cache
from ..capture.claims import Claims
from ..capture.feature_places import find_places
from ..capture.features.prepare import Feature, check_existing, check_sizes
from ..capture.rows import ShardRows, read_shard_rows
from ..capture.runner import CaptureReport, CaptureRunner
from ..capture.shard_runner import ShardRunner, ShardTask, missing_shards
from ..capture.teacher_pass import TeacherPass
from ..data.lengths import LENGTHS_KEY, lengths_to_npz
from ..errors import StreamError
from ..kernels import prepare_topk
from ..teachers.protocol import Teacher
from ..teachers.tensor_parallel import ParallelGroup
from ..utils.signals import Stop, Stopped
from .planned import PlannedShards

_PAUSE = 0.2  # seconds between two looks at the claims of others


def begin_planned(
    planned: PlannedShards,
    teacher_pass: TeacherPass,
    store: Store,
    claims: Claims,
    stack: ExitStack,
    features: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> Begun:
    """Begin or continue the cache of planned shards, as a capture does. features: names of hidden states. stack: ends
    the writers."""
    plan, data = planned.plan, planned.data
    places = find_places(teacher_pass.teacher, data, features)
    check_sizes(places, plan)
    check_existing(store, planned.spec, places, teacher_pass.settings)
    store.create(LENGTHS_KEY, lengths_to_npz(plan.lengths, plan.dataset))
    return begin_cache(
        teacher_pass, data, plan, planned.spec, places, store, claims, stack, group=ParallelGroup(), say=say
    )


class WriteThrough(ShardRunner):
    """Captures shards when they are asked for. `open` makes one, and writes plan, spec and the specs of features.

    rank, world_size: of this process, among those that train. stop: ends the capture of a shard, if those who wait for
    it may do without. cache: to read from. written: shards that it captured.
    """

    def __init__(
        self,
        planned: PlannedShards,
        teacher_pass: TeacherPass,
        store: Store,
        claims: Claims,
        begun: Begun,
        stack: ExitStack,
        rank: int,
        world_size: int,
        stop: Stop | None = None,
    ) -> None:
        self.stop, self._may_stop = stop or Stop(), False
        super().__init__(
            teacher_pass, planned.data, planned.plan, store, claims, begun.features,
            should_stop=lambda: self._may_stop and self.stop.asked,
        )  # fmt: skip
        assert begun.targets is not None, "this process is its whole group"
        self._begun = begun
        self._writers = {"": begun.targets, **begun.writers}
        self._there = {name: set() for name in self._writers}
        self._teacher_pass, self._stack, self._rank, self._world_size = teacher_pass, stack, rank, world_size
        self.cache: Cache = open_cache(store)
        self.written = 0
        self._lock = threading.Lock()
        self._requests: list[Requests] = []
        self._rows: dict[int, ShardRows] = {}  # of shards that are waited for, read by those who wait

    @classmethod
    def open(
        cls,
        planned: PlannedShards,
        teacher: Teacher,
        store: Store,
        *,
        features: Sequence[str] = (),
        rank: int = 0,
        world_size: int = 1,
        stop: Stop | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> "WriteThrough":
        """Begin or continue a cache. features: hidden states to capture as well. Raises CacheError if the store holds
        another capture's cache, naming what differs, and what `prepare_features` raises."""
        claims, teacher_pass = Claims(store, rank, world_size), TeacherPass(teacher, planned.settings)
        prepare_topk(teacher.device)
        with ExitStack() as stack:
            begun = begin_planned(planned, teacher_pass, store, claims, stack, features, say)
            kept = stack.pop_all()
        return cls(planned, teacher_pass, store, claims, begun, kept, rank, world_size, stop)

    @property
    def features(self) -> list[Feature]:
        """The hidden states that are captured as well."""
        return self._begun.features

    def requests(self, wake: Callable[[], None], *, may_stop: bool = False) -> "Requests":
        """The requests of one iteration over a source; see `prefetch.Helper`. may_stop: whether a stop ends it."""
        made = Requests(self, wake, may_stop)
        with self._lock:
            self._requests = [one for one in self._requests if not one.closed] + [made]
        return made

    def has(self, index: int) -> bool:
        """Whether a shard is committed, with its features. From any thread."""
        return not self._lacking(index)

    def read_rows(self, index: int) -> None:
        """Read the rows of a shard that has to be captured. From any thread: texts may have to be tokenized."""
        self._rows[index] = read_shard_rows(self._plan, self._data, index)

    def forget_rows(self, index: int) -> None:
        """Drop the rows of a shard that is there."""
        self._rows.pop(index, None)

    def capture(self, index: int, *, may_stop: bool = False) -> float:
        """Capture a shard, and hand it to the writers, unless it is there or another process does it: then the seconds
        after which to look again. On the thread that trains. may_stop: whether a stop ends it, with `Stopped`."""
        self._collect(wait=False)
        self._claims.keep()
        if index in self._submitted:
            return _PAUSE
        if not (lacking := self._lacking(index)):
            return 0.0
        if seconds := self._claims.take(str(index)):
            return min(seconds, _PAUSE)
        task = ShardTask(index, "" in lacking, tuple(name for name in lacking if name))
        if (rows := self._rows.pop(index, None)) is None:
            rows = read_shard_rows(self._plan, self._data, index)
        self._may_stop = may_stop
        try:
            made = self._run(task, rows)
        except Stopped:
            self._claims.drop(str(index))
            raise
        self._submit(task, rows, *made)
        self.written += 1
        futures = self._submitted[index]
        for future in futures.values():
            future.add_done_callback(lambda _: self._tell() if all(f.done() for f in futures.values()) else None)
        return 0.0

    def _tell(self) -> None:
        """Something was committed: those who wait look again. On a writer's thread."""
        with self._lock:
            waiting = [one for one in self._requests if not one.closed]
        for one in waiting:
            one.look()

    def missing(self) -> set[int]:
        """The shards that are not there, of the targets or of a feature."""
        return missing_shards(self._store, self._plan, self.features)

    def finish(self) -> CaptureReport | None:
        """Once the training is complete: if all of the training split is there, capture the held-out shards that are
        not, and seal the cache. None if shards of the training split are missing, which this training did not need."""
        self._collect(wait=True)
        if any(index < self._plan.train_shards for index in self.missing()):
            return None
        runner = CaptureRunner(
            self._teacher_pass,
            self._data,
            self._plan,
            self._store,
            self._claims,
            features=self.features,
            rank=self._rank,
            world_size=self._world_size,
            stop=self.stop,
        )
        return runner.run(self._begun.targets, self._begun.writers)

    def close(self) -> None:
        """Wait for what is being written, and give up the claims."""
        try:
            self._collect(wait=True)
        finally:
            for name in self._claims.held:
                self._claims.drop(name)
            self._stack.close()


class Requests:
    """The shards that the threads of one iteration wait for; see `prefetch.Helper`."""

    def __init__(self, cache: WriteThrough, wake: Callable[[], None], may_stop: bool) -> None:
        self._cache, self._wake, self._may_stop = cache, wake, may_stop
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[None]] = {}
        self.closed = False

    def need(self, index: int) -> None:
        """Return once a shard is committed. On a thread of the loader."""
        if self._cache.has(index):
            return
        self._cache.read_rows(index)
        with self._lock:
            if self.closed:
                raise StreamError("the loader was closed.")
            future = self._waiting.setdefault(index, Future())
        self._wake()
        future.result()

    def look(self) -> None:
        """Let those go on whose shards are there."""
        with self._lock:
            waiting = list(self._waiting)
        for index in filter(self._cache.has, waiting):
            with self._lock:
                future = self._waiting.pop(index, None)
            if future is not None:
                self._cache.forget_rows(index)  # another process may have captured it
                future.set_result(None)

    def work(self, idle: bool) -> float | None:
        self.look()
        with self._lock:
            waiting = list(self._waiting)
        pauses = []
        if waiting and self._may_stop and self._cache.stop.asked:
            if idle:
                raise Stopped
            return None
        for index in waiting:
            if not (pause := self._cache.capture(index, may_stop=self._may_stop)):
                return 0.0
            pauses.append(pause)
        return min(pauses, default=None)

    def close(self) -> None:
        with self._lock:
            self.closed = True
            waiting, self._waiting = list(self._waiting.values()), {}
        for future in waiting:
            future.set_exception(StreamError("the loader was closed."))
