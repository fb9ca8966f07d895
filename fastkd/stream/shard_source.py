"""ShardSource: optimizer steps from shards, in an exact order, prefetched on threads. Base of the sources."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from typing import Any, NamedTuple, TypedDict

import torch

from ..cache.workspace import Workspace
from ..errors import StreamError
from ..utils.distributed import Reduce
from ..utils.signals import Stopped
from ..utils.words import Words, words_of
from .batch import LAYOUTS, AnyBatch, Step
from .buckets import as_buckets
from .gather import BatchFormat, OpenShard, TextInputs, gather, gather_examples
from .mixture import MixedSequences, SequenceStream
from .prefetch import Helper, Prefetcher
from .split import ShardOrigin, ShardTable
from .step_plan import LeaveOut, LoaderProgress, RankShare, ShardKey, StepPlan

VERSION = 1  # of the state, and of the order in which it is a position


class _RankStep(NamedTuple):
    """A rank's share of a step, assembled. copied: an event after the copy to the GPU."""

    share: RankShare
    batches: Sequence[AnyBatch]
    copied: torch.cuda.Event | None


# waits for the sums over ranks: how many have stopped, positions, targets and vectors of each signal, and the
# micro-batches of each rank
Total = Callable[[], list[int]]


class LoaderPass:
    """One iteration over a loader: prefetches, and sums counts over the ranks one step ahead. `close` it when done."""

    def __init__(self, source: "ShardSource", progress: LoaderProgress, epochs: int | None) -> None:
        self._source = source
        self._free = list(source._workspaces)
        # a stream of its own, so that copies overlap with the student's work on the GPU
        self._stream: Any = None
        if source._form.device.type == "cuda":
            self._stream = torch.cuda.Stream(source._form.device)  # type: ignore[no-untyped-call]
        shares = source._plan.shares(
            progress, rank=source._rank, world_size=source._world_size, epochs=epochs, leave_out=source._leave_out
        )
        self._prefetcher = Prefetcher(
            shares, self._read, self._assemble, self._release, shards=source._max_shards, steps=source._prefetch,
            threads=source._threads, helper=source._helper(self._wake),
        )  # fmt: skip
        self._fetched: deque[tuple[_RankStep | None, Total] | Exception | None] = deque()

    def next(self) -> tuple[Step, LoaderProgress] | None:
        """The next step, and the progress once it is taken; None after the last. Raises Stopped on all ranks if one has
        no step since it was asked to stop."""
        if not self._fetched:
            self._fetched.append(self._fetch())
        item = self._fetched[0]
        if isinstance(item, Exception):
            raise item
        if item is None:
            return None
        self._fetched.popleft()
        if self._source._reduce is not None:
            # the sums of the next step are computed while this one is trained on
            self._fetched.append(self._fetch())
        step, total = item
        names = self._source.counted
        stopped, positions, *found = total()
        if stopped or step is None:
            raise Stopped
        share, batches, copied = step
        counts, numbers = found[: len(names)], found[len(names) :]
        if copied is not None:
            current = torch.cuda.current_stream(self._source._form.device)
            current.wait_event(copied)
            for tensor in (tensor for batch in batches for tensor in batch.tensors()):
                tensor.record_stream(current)
        if (missing := max(*numbers, self._source._form.micro_batches or 0) - len(batches)) > 0:
            batches = [*batches, *[self._source._form.empty()] * missing]
        by_name = dict(zip(names, counts, strict=True))
        batches = [replace(batch, counts=by_name) for batch in batches]
        after = share.after
        batches = self._source._handed_out([self._source._form.with_inputs(batch) for batch in batches])
        return Step(batches, counts[0], positions, share.sequences, after.epoch, after.number - 1), after

    def _wake(self) -> None:
        if (prefetcher := self.__dict__.get("_prefetcher")) is not None:  # its threads may be faster
            prefetcher.wake()

    def close(self) -> None:
        """End the threads, and drop the steps that are ready."""
        self._prefetcher.close()
        self._fetched.clear()

    def _fetch(self) -> tuple[_RankStep | None, Total] | Exception | None:
        """The next step of this rank, its sums begun; or the error that prevented it, to be raised when it is due."""
        names, numbers = self._source.counted, [0] * self._source._world_size
        try:
            step = self._prefetcher.next()
        except Exception as error:
            return error
        except Stopped:  # the others learn of it from the sums
            step, mine = None, [1, 0, *[0] * len(names), *numbers]
        else:
            if step is None:
                return None
            numbers[self._source._rank] = len(step.batches)
            own = [batch.own_counts() for batch in step.batches]
            counts = [sum(one[name] for one in own) for name in names]
            mine = [0, sum(b.positions for b in step.batches), *counts, *numbers]
        return step, ((lambda: mine) if self._source._reduce is None else self._source._reduce(mine))

    def _read(self, key: ShardKey) -> OpenShard:
        try:
            workspaces = self._free.pop()
        except IndexError:
            workspaces = [Workspace() for _ in range(1 + len(self._source._form.signals))]
            self._source._workspaces.append(workspaces)
        return self._source._open(*key, workspaces)

    def _assemble(self, share: RankShare, shards: Mapping[Any, OpenShard]) -> _RankStep:
        if not share.shards:
            return _RankStep(share, [], None)
        form = self._source._form
        with torch.cuda.stream(self._stream):
            sequences = [(shards[key], numbers) for key, numbers in share.shards.items()]
            batches: Sequence[AnyBatch] = (gather if form.data is None else gather_examples)(sequences, form)
            batches = self._source._assembled(batches)
            if form.device.type != "cpu":
                batches = [batch.to(form.device, non_blocking=True) for batch in batches]
            return _RankStep(share, batches, None if self._stream is None else self._stream.record_event())

    def _release(self, shard: OpenShard) -> None:
        self._free.append(shard.workspaces)


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Arguments that all sources have: the order, this process's share of it, and how micro-batches are made.

    See `CachedSource`, whose arguments have the same names. Raises StreamError for an invalid one.
    """

    batch_size: int | None = None
    batch_tokens: int | None = None
    micro_tokens: int | None = 8192
    micro_batch_size: int | None = None
    micro_batches: int | None = None
    layout: str = "padded"
    seed: int = 0
    shuffle: bool = True
    shards_open: int = 8
    rank: int = 0
    world_size: int = 1
    reduce: Reduce | None = None
    split: str = "train"
    skip: int = 0
    max_positions: int | None = None
    device: torch.device | str | None = None
    threads: int = 2
    prefetch: int = 2
    buckets: Any = None

    def __post_init__(self) -> None:
        least = {1: ("shards_open", "world_size", "threads", "prefetch"), 0: ("seed", "skip", "rank")}
        for lowest, names in least.items():
            check_integers(lowest, **{name: getattr(self, name) for name in names})
        limits = (
            "micro_tokens", "micro_batch_size", "micro_batches", "max_positions", "batch_size", "batch_tokens",
        )  # fmt: skip
        check_integers(1, **{name: value for name in limits if (value := getattr(self, name)) is not None})
        object.__setattr__(self, "buckets", as_buckets(self.buckets))
        if self.layout not in LAYOUTS:
            raise StreamError(f"layout: got {self.layout!r}; expected one of {', '.join(LAYOUTS)}.")
        if (self.batch_size is None) == (self.batch_tokens is None):
            raise StreamError(
                f"batch_size, batch_tokens: got {self.batch_size} and {self.batch_tokens}; expected exactly one of the "
                "two."
            )
        if self.micro_batches is not None and self.micro_batch_size is not None:
            raise StreamError(
                f"micro_batches, micro_batch_size: got {self.micro_batches} and {self.micro_batch_size}; expected at "
                "most one of the two."
            )
        if self.rank >= self.world_size:
            raise StreamError(
                f"rank: got {self.rank}; expected 0 to {self.world_size - 1}, with {self.world_size} ranks."
            )
        if self.world_size > 1 and self.reduce is None:
            raise StreamError(
                f"reduce: got None; expected a function for {self.world_size} ranks, whose counts have to be summed. "
                "Pass fastkd.stream.summed_over(group)."
            )

    @property
    def where(self) -> torch.device:
        """The device of the micro-batches."""
        return torch.device("cpu" if self.device is None else self.device)

    def describe(self) -> dict[str, Any]:
        """What decides which sequences a step has, under the names of the arguments."""
        names = ("batch_size", "batch_tokens", "seed", "shuffle", "shards_open", "split", "skip", "max_positions")
        return {name: getattr(self, name) for name in names}


class SourceChanges(TypedDict, total=False):
    """Fields of `SourceOptions`."""

    batch_size: int | None
    batch_tokens: int | None
    micro_tokens: int | None
    micro_batch_size: int | None
    micro_batches: int | None
    layout: str
    seed: int
    shuffle: bool
    shards_open: int
    rank: int
    world_size: int
    reduce: Reduce | None
    split: str
    skip: int
    max_positions: int | None
    device: torch.device | str | None
    threads: int
    prefetch: int
    buckets: Any


class ShardSource(ABC):
    """An iterable of optimizer steps (`Step`) over one epoch of shards; `steps()` goes through epochs without end.

    A subclass says where shards come from (`_open`), and may change micro-batches when they are assembled, on a thread
    and on the host (`_assembled`), and when a step is handed out, on the thread of the caller (`_handed_out`).

    tables: the sequences of each origin. shares: the part of the sequences from each. form: of the micro-batches.
    describes: what decides the shards, by name, for the fingerprint, before the options.

    The state (`state_dict`) is the position of all ranks together. Another number of ranks or threads, or other
    micro-batches, resume from it with the same steps.
    """

    def __init__(
        self,
        tables: Sequence[ShardTable],
        shares: Sequence[Fraction],
        form: BatchFormat,
        options: SourceOptions,
        describes: Mapping[str, Any],
    ) -> None:
        sizes = [t.sequences for t in tables]
        shards_open, shuffle = options.shards_open, options.shuffle

        def new_plan() -> StepPlan:
            stream = SequenceStream(sizes, shares, options.seed, shards_open=shards_open, shuffle=shuffle)
            return StepPlan(
                stream, tables, batch_size=options.batch_size, batch_tokens=options.batch_tokens, keep=2 * max_shards
            )

        max_shards = sum(min(shards_open if shuffle else 1, len(size)) for size in sizes) + options.threads
        self._plan, self._new_plan = new_plan(), new_plan
        stream = self._plan.stream
        if (per_step := min(options.batch_size or len(stream), len(stream))) < options.world_size:
            raise StreamError(
                f"world_size: got {options.world_size} ranks; expected at most {per_step}, the sequences per step. "
                "Use fewer ranks, or larger steps."
            )
        self._form = form
        self.counted = ("targets", *(signal.name for signal in form.signals))
        self._tables, self._shares = tables, shares
        self._leave_out: LeaveOut | None = None
        self._rank, self._world_size, self._reduce = options.rank, options.world_size, options.reduce
        self._threads, self._prefetch, self._max_shards = options.threads, options.prefetch, max_shards
        # the memory that shards are decoded into, kept: memory that was touched before is much faster
        self._workspaces: list[list[Workspace]] = []
        self._progress = LoaderProgress()
        self._pass: LoaderPass | None = None
        # all that decides which sequences a step has, under the names of the arguments
        self.fingerprint: dict[str, Any] = {**describes, **options.describe()}

    @abstractmethod
    def _open(self, source: int, row: int, workspaces: list[Workspace]) -> OpenShard:
        """A shard, by the number of its table and its row there. On a thread. workspaces: one for the targets, and one
        for each signal."""

    def _open_inputs(self, source: int, row: int, workspaces: list[Workspace]) -> OpenShard:
        """The same, on the thread of the caller, for its inputs alone: targets may be missing."""
        return self._open(source, row, workspaces)

    def _assembled(self, batches: Sequence[AnyBatch]) -> Sequence[AnyBatch]:
        """A step's micro-batches on the host, before they are copied to the device. On a thread."""
        return batches

    def _handed_out(self, batches: Sequence[AnyBatch]) -> Sequence[AnyBatch]:
        """A step's micro-batches on the device, as the caller gets them. On the thread of the caller."""
        return batches

    def _helper(self, wake: Callable[[], None]) -> Helper | None:
        """What shards wait for, of one iteration, and the thread that iterates has to do. wake: tells that thread."""
        return None

    @abstractmethod
    def _shard_bytes(self, table: ShardTable) -> int:
        """Bytes of the largest shard, open, without signals."""

    @property
    def origins(self) -> list[ShardOrigin]:
        """What the shards come from."""
        return [table.origin for table in self._tables]

    @property
    def words(self) -> Words:
        """The words for its data."""
        return words_of(self._form.spec.inputs)

    @property
    def described(self) -> list[dict[str, Any]]:
        """What identifies the sequences of each origin, as JSON; see `ShardTable.describe`."""
        return [table.describe() for table in self._tables]

    @property
    def positions(self) -> int:
        """Of all origins together, each read once."""
        return sum(int(table.positions.sum()) for table in self._tables)

    def __iter__(self) -> Iterator[Step]:
        """The steps from the current position to the end of the epoch; then the position is the start of the next."""
        return self.steps(epochs=1)

    def __len__(self) -> int:
        """Steps per epoch. By batch_tokens for a mixture: about, from the mean lengths of its sequences."""
        return self._plan.steps_per_epoch(self._shares)

    def steps(self, epochs: int | None = None) -> Iterator[Step]:
        """The steps from the current position to the end of its epoch, and of epochs − 1 more (None: without end).

        Only one iterator is active: a new one ends the one before. If that has handed out the last step of an epoch,
        the new one begins the next epoch, whether or not the one before was asked for more.
        """
        ended = self._pass is not None and self._progress.sequences >= len(self._plan.stream)
        self.close()
        if ended:
            self._progress = LoaderProgress(self._progress.epoch + 1)
        current = self._pass = LoaderPass(self, self._progress, epochs)
        try:
            while (item := current.next()) is not None:
                step, self._progress = [item[0]], item[1]
                del item
                yield step.pop()  # the caller holds the only reference, so dropping it frees the memory
            if self._pass is current:  # at its end, and not ended by another iterator
                self._progress = LoaderProgress(self._progress.epoch + 1)
        finally:
            current.close()

    def close(self) -> None:
        """End the active iterator and its threads. Leaving the loop does it too."""
        if self._pass is not None:
            self._pass.close()
            self._pass = None

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; stay at the current position if it is in that epoch already."""
        check_integers(0, epoch=epoch)
        if epoch != self._progress.epoch:
            self.close()
            self._progress = LoaderProgress(int(epoch))

    @property
    def sampler(self) -> "ShardSource":
        """Itself: Lightning calls `set_epoch` of a loader's sampler."""
        return self

    def seek(self, epoch: int, step: int) -> None:
        """Go to the position before a step of an epoch, both counted from 0; the same steps follow as if the loader had
        been iterated there. Reads the sequence lengths of a few shards at most, and decodes nothing.

        step = the number of steps in the epoch is its end. Raises StreamError beyond that.
        """
        check_integers(0, epoch=epoch, step=step)
        self.close()
        self._progress = self._plan.seek(int(epoch), int(step))

    @property
    def form(self) -> BatchFormat:
        """How micro-batches are made."""
        return self._form

    def leave_out(self, which: LeaveOut | None) -> None:
        """Leave sequences out of the micro-batches, from the next `steps` on, for someone who trains on something else
        instead. Steps are divided as before, and `Step.sequences` counts them, `Step.positions` does not."""
        self._leave_out = which

    def upcoming(self, steps: int) -> list[tuple[int, MixedSequences]]:
        """The epoch and the sequences (with the rows of their shards in the tables) of each of the next steps, those
        that are left out included."""
        plan = self._new_plan()  # the other one belongs to a thread
        return list(islice(plan.upcoming(self._progress), steps))

    def text_inputs(self, source: int, row: int) -> tuple[TextInputs, int, int]:
        """The inputs of a shard of text, by the number of its table and its row there; its number; and the number in it
        of the first sequence to read."""
        opened = self._open_inputs(source, row, [Workspace() for _ in range(1 + len(self._form.signals))])
        table = self._tables[source]
        return replace(opened.inputs, tokens=opened.inputs.tokens.copy()), int(table.shard[row]), int(table.first[row])

    def state_dict(self) -> dict[str, Any]:
        """The position, after the step handed out last, in values that JSON can hold. The same on every rank."""
        at = self._progress
        values = {"epoch": at.epoch, "sequences": at.sequences, "positions": at.positions, "steps": at.number}
        return {"version": VERSION, **values, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the position of a state. Raises StreamError, naming the differences, if it is of a loader with other
        settings or another cache."""
        version = state.get("version")
        if version != VERSION:
            raise StreamError(f"state: got version {version!r}; expected {VERSION}. Use the fastkd that wrote it.")
        theirs = state.get("fingerprint")
        if not isinstance(theirs, Mapping):
            raise StreamError("state: got no fingerprint; expected what `state_dict` returned.")
        ours = self.fingerprint
        if others := [n for n in sorted(ours.keys() | theirs.keys()) if ours.get(n) != theirs.get(n)]:
            listed = "; ".join(f"{n}: {theirs.get(n)!r} there, {ours.get(n)!r} here" for n in others)
            raise StreamError(
                f"state: it is of a loader with other settings: {listed}. Use the same settings, or start a new run."
            )
        values: dict[str, Any] = {name: state.get(name) for name in ("epoch", "sequences", "positions", "steps")}
        check_integers(0, **{f"state: {name}": value for name, value in values.items()})
        progress = LoaderProgress(*map(int, values.values()))
        total = len(self._plan.stream)
        if progress.sequences > total:
            raise StreamError(f"state: got {progress.sequences} sequences; expected at most {total}, an epoch.")
        self.close()
        self._progress = progress

    @property
    def memory(self) -> int:
        """Maximum bytes of decoded shards, if no step needs more of them by itself: the open ones, and one per thread.

        In memory there are also the encoded shard of every thread that reads, and `prefetch` + 2 steps.
        """
        signals = sum(signal.row_bytes() for signal in self._form.signals)
        return max(self._shard_bytes(t) + signals * int(t.positions.max()) for t in self._tables) * self._max_shards


def check_integers(least: int, **values: Any) -> None:
    """StreamError, naming it, for a value that is no integer of at least this."""
    for name, value in values.items():
        if isinstance(value, bool) or not hasattr(value, "__index__") or not least <= int(value) < 2**63:
            raise StreamError(f"{name}: got {value!r}; expected an integer of at least {least}.")
