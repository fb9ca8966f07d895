"""`fastkd.integrations.ray.capture`: fill a cache by the workers of a Ray cluster.

The driver owns the queue of shards, so that no claims are needed; what decides is the commit, which creates a shard
once. A worker has the shard that it is at, and the next one while there are many. When a worker dies, the driver puts
its shards back, and starts another one in its place, wherever the cluster has room: after Ray's own restart, an actor
would have to be told to load its teacher in any case.
"""

import os
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from functools import partial
from typing import Any, Unpack

from ...cache.manifest import runs
from ...capture.shard_runner import CaptureReport
from ...errors import ClusterError, TeacherUnavailable, passes
from ...settings import CaptureSettings
from ...settings_changes import CaptureChanges, changed
from ...utils.progress import MODES, Mode, Progress, notes_only
from ...utils.signals import Stop
from .capture_report import RayCaptureReport, WorkerReport
from .capture_worker import TALK, CaptureWorker, Heard, Survey, Work
from .cluster import Resources, connected, resources_of, workers_that_fit


class CaptureOptions(CaptureChanges, total=False):
    """Other arguments of `fastkd.capture`."""

    fingerprint: str
    vocab_size: int | None
    column: str | None
    text_documents: str
    tokenizer: Any
    loss_on: str
    threads: int
    notes: str


DEFAULTS = CaptureSettings()
ENDS = 8  # of one worker, one after another without a commit, after which the capture fails
GRACE_SECONDS = 20.0  # for batches and commits under way, after a stop
_LOOK_SECONDS, _AGAIN_SECONDS, _LONE_SECONDS = 0.2, 1.0, 30.0


def capture(
    teacher: Any,
    data: Any,
    out: Any,
    settings: CaptureSettings = DEFAULTS,
    *,
    workers: int | None = None,
    gpus_per_worker: float | None = None,
    cpus_per_worker: float = 1.0,
    stop: Stop | None = None,
    progress: Mode = "none",
    **options: Unpack[CaptureOptions],
) -> RayCaptureReport:
    """Run a teacher once over a dataset on a Ray cluster, and store its targets in a cache. Calling it again continues.

    teacher, data, out, settings: as for `fastkd.capture`, where every worker runs: names are opened there, objects are
        pickled and sent there. out: a URL, or a folder that all machines share.
    workers: their number; more of them than there is room for begin when there is. None: as many as there is room for.
    gpus_per_worker, cpus_per_worker: reserved for each. None: one GPU if the cluster has any.
    stop: stops the capture when called. progress: as for `fastkd.capture`, of all workers together.
    options: other arguments of `fastkd.capture`, and fields of the settings.

    The cluster is the one that `ray.init` was called for, else that at RAY_ADDRESS, else one that runs on this machine.
    Returns a report; its `status` is 75 if work remains. Raises ClusterError without Ray or a cluster, and if a worker
    dies again and again; otherwise what `fastkd.capture` raises, of the first worker that fails.
    """
    for name in ("shards", "rank", "world_size", "group"):
        if name in options:
            raise TypeError(f"capture() on Ray got {name!r}, which the driver decides")
    if not callable(progress) and progress not in MODES:
        raise ValueError(f"progress: got {progress!r}; expected one of {', '.join(MODES)}.")
    own = {f.name for f in fields(CaptureSettings)}
    changes = {name: value for name, value in options.items() if name in own}
    others = {name: value for name, value in options.items() if name not in own}
    work = Work(
        partial(_as_given, teacher, data), out, changed("capture", settings, changes), others, os.getcwd()
    )  # fmt: skip
    return run_work(
        work,
        workers=workers,
        gpus_per_worker=gpus_per_worker,
        cpus_per_worker=cpus_per_worker,
        stop=stop,
        progress=progress,
    )


def _as_given(teacher: Any, data: Any) -> tuple[Any, Any]:
    return teacher, data


def run_work(
    work: Work,
    *,
    workers: int | None,
    gpus_per_worker: float | None,
    cpus_per_worker: float,
    stop: Stop | None,
    progress: Mode,
) -> RayCaptureReport:
    """Capture on the cluster. See `capture`."""
    if workers is not None and workers < 1:
        raise ClusterError(f"workers: got {workers}; expected a number from 1 on.")
    with connected() as ray:
        each = resources_of(ray, cpus_per_worker, gpus_per_worker)
        driver = CaptureDriver(ray, work, workers or workers_that_fit(ray, each), each, stop or Stop(), progress)
        return driver.run()


class _Hand:
    """An actor. given: the shards it has, in order. settled: positions of the shards that it is done with."""

    def __init__(self, number: int, actor: Any) -> None:
        self.number, self.actor = number, actor
        self.given: list[int] = []
        self.ran = self.settled = 0
        self.busy = 0.0
        # loading, loaded, opening, working; waiting after a failure; ended, last, done after its capture; dead
        self.state = "loading"
        self.begun = 0  # how often it was asked to begin: answers of earlier calls are not listened to


class CaptureDriver:
    """Runs a capture by `workers` actors. For one `run`."""

    def __init__(self, ray: Any, work: Work, workers: int, each: Resources, stop: Stop, progress: Mode) -> None:
        self._ray, self._work, self._workers, self._each, self._stop = ray, work, workers, each, stop
        options = {
            **each.options(),
            "max_restarts": 0,
            "concurrency_groups": {TALK: 3},
            "scheduling_strategy": "SPREAD",
        }
        self._actors = ray.remote(**options)(CaptureWorker)
        self._sent = ray.put(work)  # a teacher that was given as an object is sent once to each machine
        self._wait = max(1.0, workers / 100)  # seconds of an exchange without events
        self._calls: dict[Any, tuple[_Hand, int, Callable[..., None]]] = {}
        self._later: list[tuple[float, Callable[[], None]]] = []
        self._hands: dict[int, _Hand] = {}
        self._reports = [WorkerReport(number) for number in range(workers)]
        self._ends: Counter[int] = Counter()  # of a worker, since its last commit
        self._survey: Survey | None = None
        self._left: set[int] = set()  # shards that are not there
        self._queue: deque[int] = deque()
        self._lost: dict[int, _Hand] = {}  # shards that were given to workers that died
        self._mode = progress
        self._progress = notes_only(progress, "position")
        self._closing: _Hand | None = None
        self._complete = False

    def run(self) -> RayCaptureReport:
        """Capture until the cache has every shard, or a stop is requested."""
        started = time.perf_counter()
        try:
            with self._stop.gently():
                for number in range(self._workers):
                    self._start(number)
                lone = time.monotonic() + _LONE_SECONDS
                while not (self._complete or self._stop.asked):
                    self._take_turn()
                    if all(hand.state == "loading" for hand in self._hands.values()) and time.monotonic() > lone:
                        self._progress.event(
                            "note", text=f"waiting for a worker: {self._workers} want {self._each} each"
                        )
                        lone = time.monotonic() + 10 * _LONE_SECONDS
                if not self._complete:
                    self._end_early()
        finally:
            self._progress.close()
            for hand in self._hands.values():
                self._end(hand)
        return self._report(time.perf_counter() - started)

    # --- what is called, and what comes back ---------------------------------------------------------------------

    def _take_turn(self) -> None:
        """Wait a little for answers, and act on them."""
        now = time.monotonic()
        due = [action for at, action in self._later if at <= now]
        self._later = [(at, action) for at, action in self._later if at > now]
        for action in due:
            action()
        if not self._calls:
            time.sleep(_LOOK_SECONDS)
            return
        ready, _ = self._ray.wait(list(self._calls), num_returns=1, timeout=_LOOK_SECONDS)
        for answer in ready:
            hand, begun, then = self._calls.pop(answer)
            if hand.state == "dead" or begun != hand.begun:
                continue
            try:
                value = self._ray.get(answer)
            except self._ray.exceptions.RayTaskError as error:
                self._failed(hand, error.cause)
            except self._ray.exceptions.RayError as error:
                self._died(hand, str(error))
            else:
                then(hand, value)

    def _call(self, hand: _Hand, method: Any, then: Callable[..., None], *args: Any) -> None:
        self._calls[method.remote(*args)] = hand, hand.begun, then

    def _start(self, number: int) -> None:
        hand = self._hands[number] = _Hand(number, self._actors.remote(self._sent, number, self._workers))
        self._call(hand, hand.actor.load, self._loaded)

    def _loaded(self, hand: _Hand, host: str) -> None:
        report = self._reports[hand.number]
        report.starts += 1
        if host not in report.hosts:
            report.hosts.append(host)
        hand.state = "loaded"
        self._open()

    def _open(self) -> None:
        """Let one worker begin the cache, and then all others."""
        states = [hand.state for hand in self._hands.values()]
        if self._survey is None and "opening" in states:
            return
        for hand in self._hands.values():
            if hand.state == "loaded":
                hand.state = "opening"
                self._call(hand, hand.actor.open, self._opened)
                if self._survey is None:
                    return

    def _opened(self, hand: _Hand, _: None) -> None:
        if self._survey is None:
            self._call(hand, hand.actor.survey, self._surveyed)
        else:
            self._begin(hand)

    def _surveyed(self, hand: _Hand, found: Survey) -> None:
        self._survey, self._left, self._queue = found, set(found.missing), deque(found.missing)
        self._progress.close()
        self._progress = Progress(found.totals["positions"], unit="position", already=found.there, mode=self._mode)
        self._call(hand, hand.actor.exchange.options(concurrency_group=TALK), self._told, [], 0.0)
        self._open()

    def _told(self, hand: _Hand, heard: Heard) -> None:
        """What the first worker says of the data and the plan; that of the others is the same."""
        for event in heard.events:
            self._progress.event(event.pop("event"), **event)
        self._begin(hand)

    def _begin(self, hand: _Hand) -> None:
        hand.state, hand.ran, hand.settled = "working", 0, 0
        self._call(hand, hand.actor.capture, self._ended)
        self._talk(hand)

    def _talk(self, hand: _Hand) -> None:
        """Give a worker shards, and listen to it; the first one is told to end once no shard is left."""
        if hand.state in ("ended", "last"):  # one more exchange, for events that were on their way
            hand.state = {"ended": "last", "last": "done"}[hand.state]
            if hand.state == "done":
                return
        if not self._left and self._closing is None:
            self._closing = hand
            hand.actor.close.options(concurrency_group=TALK).remote()
        if hand is self._closing:
            return
        want, shards = (2 if len(self._queue) >= self._workers else 1), list[int]()
        while self._queue and len(hand.given) + len(shards) < want:
            if (index := self._queue.popleft()) in self._left:
                shards.append(index)
        hand.given += shards
        exchange = hand.actor.exchange.options(concurrency_group=TALK)
        self._call(hand, exchange, self._heard, shards, self._wait)

    def _heard(self, hand: _Hand, heard: Heard) -> None:
        self._account(hand, heard)
        self._talk(hand)

    def _ended(self, hand: _Hand, report: CaptureReport) -> None:
        """A worker has ended: the one that seals, one whose teacher does not answer, or, after a stop, any."""
        if hand is not self._closing and not self._stop.asked:
            why = next(reversed(report.failed.values()), "it ended")
            self._failed(hand, TeacherUnavailable(why))
            return
        hand.state = "ended"
        if hand is self._closing:
            self._complete = report.complete
            if not report.complete and not self._stop.asked:  # shards were deleted meanwhile
                first, last = report.missing[0][0], report.missing[-1][1]
                raise ClusterError(f"{report.cache}: shards between {first} and {last} are gone. Capture again.")

    # --- the account ---------------------------------------------------------------------------------------------

    def _account(self, hand: _Hand, heard: Heard) -> None:
        self._progress.add(heard.ran - hand.ran)
        hand.ran, hand.busy = heard.ran, heard.busy
        for event in heard.events:
            if event["event"] == "failed":
                self._left_by(hand, event)
            if event["event"] not in ("shard", "there"):
                continue
            index, positions = int(event["shard"]), int(event["positions"])
            if index in hand.given:
                hand.given.remove(index)
            self._left.discard(index)
            mine = self._reports[hand.number]
            if event["event"] == "shard":
                self._ends[hand.number] = 0
                hand.settled += positions
                mine.shards_written += 1
                mine.positions_written += positions
                mine.bytes_written += int(event.get("bytes", 0))
                self._progress.event("shard", **{k: v for k, v in event.items() if k != "event"}, worker=hand.number)
                continue
            lost = self._lost.pop(index, None)
            if lost is not None:  # its worker had committed it, and could not say so
                theirs = self._reports[lost.number]
                theirs.shards_written += 1
                theirs.positions_written += positions
                theirs.positions_lost -= min(positions, theirs.positions_lost)
            if event["captured"]:
                hand.settled += positions
                mine.positions_lost += positions
            else:
                self._progress.found(positions)
        alive = sum(hand.state == "working" for hand in self._hands.values())
        self._progress.figure("workers", alive, f"{alive} of {self._workers} workers")

    def _left_by(self, hand: _Hand, event: dict[str, Any]) -> None:
        """A worker has left a shard, for which its teacher did not answer: it waits behind all others."""
        index = int(event["shard"])
        self._reports[hand.number].positions_lost += int(event["positions"])
        if index in hand.given:
            hand.given.remove(index)
            self._queue.append(index)
        self._progress.event("failed", **{k: v for k, v in event.items() if k != "event"}, worker=hand.number)
        self._count_end(hand, lambda: TeacherUnavailable(event["why"]))

    def _put_back(self, hand: _Hand) -> None:
        """The shards of a worker that failed or died are to be captured by others, before those that wait."""
        self._queue.extendleft(index for index in reversed(hand.given) if index in self._left)
        self._lost |= dict.fromkeys(hand.given, hand)
        lost = hand.ran - hand.settled
        self._reports[hand.number].positions_lost += lost
        self._progress.found(-lost)
        hand.given, hand.ran, hand.settled = [], 0, 0
        if hand is self._closing:
            self._closing = None

    # --- failures ------------------------------------------------------------------------------------------------

    def _died(self, hand: _Hand, why: str) -> None:
        hand.state = "dead"
        self._put_back(hand)
        self._end(hand)
        where = ", ".join(self._reports[hand.number].hosts[-1:]) or "before it began"
        self._progress.event("note", text=f"worker {hand.number} died ({where}); another one takes its place")
        self._count_end(hand, lambda: ClusterError(f"worker {hand.number} died {ENDS} times in a row: {_brief(why)}"))
        self._after(_AGAIN_SECONDS, lambda: self._start(hand.number))
        if self._survey is None:
            self._open()

    def _failed(self, hand: _Hand, cause: BaseException) -> None:
        """A worker's method raised: what passes is tried again, anything else ends the capture."""
        if not passes(cause) or hand.state in ("loading", "loaded"):
            raise cause
        self._put_back(hand)
        hand.state, hand.begun = "waiting", hand.begun + 1
        self._progress.event("note", text=f"worker {hand.number} begins again: {cause}")
        self._count_end(hand, lambda: cause)

        def again() -> None:
            if hand.state == "waiting":
                hand.state = "loaded"
                self._open()

        self._after(_AGAIN_SECONDS * 2 ** self._ends[hand.number], again)
        if self._survey is None:
            self._open()

    def _count_end(self, hand: _Hand, error: Callable[[], BaseException]) -> None:
        self._ends[hand.number] += 1
        if self._ends[hand.number] >= ENDS:
            raise error()

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        self._later.append((time.monotonic() + seconds, action))

    # --- the end -------------------------------------------------------------------------------------------------

    def _end_early(self) -> None:
        """Stop all workers after their batches, and wait until what they had made is committed."""
        working = [hand for hand in self._hands.values() if hand.state == "working"]
        for hand in working:
            hand.actor.stop.options(concurrency_group=TALK).remote()
        self._queue.clear()
        deadline = time.monotonic() + GRACE_SECONDS
        while any(hand.state in ("working", "ended", "last") for hand in working) and time.monotonic() < deadline:
            self._later = []  # nothing begins again
            try:
                self._take_turn()
            except Exception as error:  # the capture ends as it would without the error: with work left
                self._progress.event("note", text=f"while stopping: {error}")
        for hand in working:
            self._put_back(hand)

    def _end(self, hand: _Hand) -> None:
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(hand.actor, no_restart=True)

    def _report(self, seconds: float) -> RayCaptureReport:
        found = self._survey or Survey(str(self._work.out), {"positions": 0, "shards": 0}, [], 0)
        written = [
            sum(getattr(one, name) for one in self._reports)
            for name in ("shards_written", "positions_written", "bytes_written", "positions_lost")
        ]
        shards, positions, size, lost = written
        busy = [hand.busy for hand in self._hands.values() if hand.ran]
        return RayCaptureReport(
            found.cache,
            self._complete,
            runs(self._left),
            found.totals,
            shards_written=shards,
            positions_written=positions,
            positions_captured=positions + lost,
            bytes_written=size,
            seconds=seconds,
            teacher_busy=sum(busy) / len(busy) if busy else 0.0,
            workers=self._reports,
        )


def _brief(text: str) -> str:
    """The lines of Ray's message that say something."""
    return " ".join(text.split())[:300]
